//! Lists, a page at a time, and their filters; also of operations.

use serde::Deserialize;
use serde_json::{Value, json};

use super::super::{
    error::{Error, Result},
    records::Operation,
    state::State,
};

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Page {
    next_token: Option<String>,
    max_results: Option<usize>,
    filters: Vec<Filter>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Filter {
    name: String,
    values: Vec<String>,
    #[serde(default)]
    condition: Condition,
}

#[derive(Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Condition {
    #[default]
    Eq,
    In,
    Between,
    BeginsWith,
}

impl Filter {
    fn takes(&self, value: &str) -> bool {
        match self.condition {
            Condition::Eq | Condition::In => self.values.iter().any(|wanted| wanted == value),
            Condition::BeginsWith => self.values.iter().any(|start| value.starts_with(start)),
            Condition::Between => {
                let number = |text: &str| text.parse::<f64>().ok();
                let bounds: Vec<_> = self.values.iter().map(|value| number(value)).collect();
                matches!((&*bounds, number(value)), ([Some(low), Some(high)], Some(value)) if (*low..=*high).contains(&value))
            }
        }
    }
}

impl Page {
    /// One page of `all`, which are in the order of their keys: those that the filters take, by the
    /// values that `field` knows of them. The token is the last key: what comes and goes between
    /// two pages moves nothing.
    pub(super) fn of<'a, T: 'a>(
        &self,
        list: &str,
        all: impl Iterator<Item = (&'a String, T)>,
        field: impl Fn(&T, &str) -> Option<String>,
        json: impl Fn(T) -> Value,
    ) -> Result<Value> {
        let most = self.max_results.unwrap_or(100);
        if !(1..=100).contains(&most) {
            return Err(Error::invalid(format!("MaxResults {most} is not from 1 to 100")));
        }
        let mut page = Vec::new();
        let mut last = None;
        let start = self.next_token.as_deref();
        for (key, item) in all.skip_while(|(key, _)| start.is_some_and(|start| key.as_str() <= start)) {
            let mut taken = true;
            for filter in &self.filters {
                let value = field(&item, &filter.name).ok_or_else(|| {
                    Error::invalid(format!("{list} cannot be filtered by {:?}", filter.name))
                })?;
                taken &= filter.takes(&value);
            }
            if !taken {
                continue;
            }
            if page.len() == most {
                return Ok(json!({ list: page, "NextToken": last }));
            }
            page.push(json(item));
            last = Some(key);
        }
        Ok(json!({ list: page }))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ByOperation {
    operation_id: String,
}

impl State {
    pub(super) fn get_operation(&self, input: &ByOperation) -> Result<Value> {
        let id = &input.operation_id;
        let operation = self.operations.get(id).ok_or_else(|| Error::no_operation(id))?;
        Ok(json!({ "Operation": operation.json() }))
    }

    pub(super) fn list_operations(&self, page: &Page) -> Result<Value> {
        let field = |operation: &&Operation, name: &str| match name {
            "STATUS" => Some("SUCCESS".into()),
            "TYPE" => Some(operation.kind.clone()),
            "UPDATE_DATE" => Some(operation.created.to_string()),
            "NAMESPACE_ID" => Some(operation.targets.get("NAMESPACE").cloned().unwrap_or_default()),
            "SERVICE_ID" => Some(operation.targets.get("SERVICE").cloned().unwrap_or_default()),
            _ => None,
        };
        let json = |operation: &Operation| json!({ "Id": operation.id, "Status": "SUCCESS" });
        page.of("Operations", self.operations.iter(), field, json)
    }
}
