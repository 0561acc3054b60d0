//! Requests and answers on the wire: JSON (awsJson1.1), and CBOR (Smithy RPC v2), which newer SDKs
//! prefer.

use ciborium::Value as Cbor;
use hyper::{HeaderMap, header};
use serde_json::{Map, Value};

use super::error::{Error, Result};

const TARGET: &str = "Route53AutoNaming_v20170314";

/// Members that are points in time, which CBOR tags as such.
const TIMES: [&str; 2] = ["CreateDate", "UpdateDate"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Cbor,
}

/// Which operation is called, and in which format.
pub fn operation(path: &str, headers: &HeaderMap) -> Result<(Format, String)> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let unknown = |what: String| Error::new("UnknownOperationException", what);
    if text("smithy-protocol") == "rpc-v2-cbor" {
        let operation = path.strip_prefix("/service/").and_then(|rest| rest.split_once("/operation/"));
        return match operation {
            Some((TARGET, operation)) => Ok((Format::Cbor, operation.into())),
            _ => Err(unknown(format!("{path:?} is not /service/{TARGET}/operation/NAME"))),
        };
    }
    match text("x-amz-target").split_once('.') {
        Some((TARGET, operation)) => Ok((Format::Json, operation.into())),
        _ => Err(unknown(format!("header X-Amz-Target is not {TARGET}.NAME"))),
    }
}

impl Format {
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/x-amz-json-1.1",
            Self::Cbor => "application/cbor",
        }
    }

    /// A request of another type may be what a web page can send without being asked.
    pub fn check(self, headers: &HeaderMap) -> Result<()> {
        let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if given.is_none_or(|given| given.split(';').next().map(str::trim) == Some(self.content_type())) {
            return Ok(());
        }
        Err(Error::new("SerializationException", format!("Content-Type is not {}", self.content_type())))
    }

    pub fn decode(self, body: &[u8]) -> Result<Value> {
        let malformed = |what: String| Error::new("SerializationException", what);
        let value = match self {
            _ if body.is_empty() => Value::Object(Map::new()),
            Self::Json => serde_json::from_slice(body).map_err(|error| malformed(error.to_string()))?,
            Self::Cbor => {
                let value: Cbor = ciborium::de::from_reader_with_recursion_limit(body, 32)
                    .map_err(|error| malformed(error.to_string()))?;
                from_cbor(value).map_err(malformed)?
            }
        };
        if !value.is_object() {
            return Err(malformed("the request is not an object".into()));
        }
        // Members that are null are as if they were not there.
        Ok(super::records::without_null(value))
    }

    pub fn encode(self, value: &Value) -> Vec<u8> {
        match self {
            Self::Json => serde_json::to_vec(value).expect("a value is JSON"),
            Self::Cbor => {
                let mut bytes = Vec::new();
                ciborium::into_writer(&to_cbor(value, false), &mut bytes).expect("memory takes it");
                bytes
            }
        }
    }
}

fn from_cbor(value: Cbor) -> std::result::Result<Value, String> {
    Ok(match value {
        Cbor::Integer(number) => {
            i64::try_from(number).map_err(|_| "a number has more than 64 bits".to_owned())?.into()
        }
        Cbor::Float(number) => number.into(),
        Cbor::Text(text) => text.into(),
        Cbor::Bool(is) => is.into(),
        Cbor::Null => Value::Null,
        Cbor::Tag(_, value) => from_cbor(*value)?,
        Cbor::Array(items) => {
            Value::Array(items.into_iter().map(from_cbor).collect::<std::result::Result<_, _>>()?)
        }
        Cbor::Map(entries) => {
            let mut object = Map::new();
            for (key, value) in entries {
                let Cbor::Text(key) = key else { return Err("a key is not a text".into()) };
                object.insert(key, from_cbor(value)?);
            }
            object.into()
        }
        _ => return Err("the request holds what no operation takes".into()),
    })
}

fn to_cbor(value: &Value, is_time: bool) -> Cbor {
    match value {
        Value::Null => Cbor::Null,
        Value::Bool(is) => Cbor::Bool(*is),
        Value::Number(number) => match (number.as_i64(), number.as_f64().unwrap_or_default()) {
            (_, at) if is_time => Cbor::Tag(1, Box::new(Cbor::Float(at))),
            (Some(number), _) => Cbor::Integer(number.into()),
            (None, number) => Cbor::Float(number),
        },
        Value::String(text) => Cbor::Text(text.clone()),
        Value::Array(items) => Cbor::Array(items.iter().map(|item| to_cbor(item, false)).collect()),
        Value::Object(object) => {
            let entry = |(key, value): (&String, &Value)| {
                (Cbor::Text(key.clone()), to_cbor(value, TIMES.contains(&key.as_str())))
            };
            Cbor::Map(object.iter().map(entry).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn cbor_says_the_same_as_json_and_tags_times() {
        let value = json!({ "Id": "x", "CreateDate": 1.5, "Counts": [1, true, null, { "n": -2 }] });
        for format in [Format::Json, Format::Cbor] {
            assert_eq!(format.decode(&format.encode(&value)).unwrap(), value, "{format:?}");
            assert_eq!(format.decode(b"").unwrap(), json!({}));
            assert!(format.decode(b"\xff\xff").is_err());
            assert!(format.decode(&format.encode(&json!([]))).is_err());
        }
        let time = Format::Cbor.encode(&json!({ "CreateDate": 1.5 }));
        assert!(time.windows(2).any(|pair| pair == [0xc1, 0xfb] || pair == [0xc1, 0xf9]), "{time:x?}");
        // As deep as a body can be.
        assert!(Format::Cbor.decode(&[0x81; 100_000]).is_err());
        assert!(Format::Json.decode("[".repeat(100_000).as_bytes()).is_err());
    }
}
