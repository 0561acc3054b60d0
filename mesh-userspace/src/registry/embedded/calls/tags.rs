//! Tags of namespaces and services, by ARN.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    super::{
        error::{Error, Result},
        records::Attributes,
        state::State,
    },
    Tag, tags,
};
use crate::registry::Rules;

#[derive(Deserialize)]
pub(super) struct ByArn {
    #[serde(rename = "ResourceARN")]
    arn: String,
}

#[derive(Deserialize)]
pub(super) struct SetTags {
    #[serde(rename = "ResourceARN")]
    arn: String,
    #[serde(rename = "Tags")]
    tags: Vec<Tag>,
}

#[derive(Deserialize)]
pub(super) struct RemoveTags {
    #[serde(rename = "ResourceARN")]
    arn: String,
    #[serde(rename = "TagKeys")]
    keys: Vec<String>,
}

impl State {
    pub(super) fn tag_resource(&mut self, input: SetTags, rules: &Rules) -> Result<Value> {
        let new = tags(Some(input.tags))?;
        self.change_tags(&input.arn, rules, |tags| tags.extend(new))
    }

    pub(super) fn untag_resource(&mut self, input: &RemoveTags, rules: &Rules) -> Result<Value> {
        self.change_tags(&input.arn, rules, |tags| tags.retain(|key, _| !input.keys.contains(key)))
    }

    fn change_tags(
        &mut self,
        arn: &str,
        rules: &Rules,
        change: impl FnOnce(&mut Attributes),
    ) -> Result<Value> {
        if let Ok(service) = self.service(arn) {
            let mut service = service.clone();
            change(&mut service.tags);
            self.check_settings(&service, rules)?;
            self.put_service(service);
        } else {
            let mut namespace = self.namespace(arn).map_err(|_| Error::no_resource(arn))?.clone();
            change(&mut namespace.tags);
            self.put_namespace(namespace);
        }
        Ok(json!({}))
    }

    pub(super) fn list_tags(&self, input: &ByArn) -> Result<Value> {
        let arn = &input.arn;
        let of_service = self.service(arn).map(|service| &service.tags);
        let tags = of_service.or_else(|_| self.namespace(arn).map(|namespace| &namespace.tags));
        let tags = tags.map_err(|_| Error::no_resource(arn))?.iter();
        let tags: Vec<_> = tags.map(|(key, value)| json!({ "Key": key, "Value": value })).collect();
        Ok(json!({ "Tags": tags }))
    }
}
