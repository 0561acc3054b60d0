"""What `deploy/ecs` holds, by AWS's own models: deploy.py TASK-DEFINITION POLICY.

Prints both as a CloudFormation template, for a linter that knows more of them."""

import json
import sys

import botocore.session
from botocore.validate import ParamValidator

definition, policy = (json.load(open(path)) for path in sys.argv[1:])
session = botocore.session.get_session()

operation = session.get_service_model("ecs").operation_model("RegisterTaskDefinition")
report = ParamValidator().validate(definition, operation.input_shape)
assert not report.has_errors(), report.generate_report()

operations = session.get_service_model("servicediscovery").operation_names
for statement in policy["Statement"]:
    for action in statement["Action"]:
        service, _, operation = action.partition(":")
        assert service == "servicediscovery" and operation in operations, action


def properties(value):
    """The same with CloudFormation's names, which are the API's with a capital."""
    if isinstance(value, list):
        return [properties(one) for one in value]
    if isinstance(value, dict):
        return {key[0].upper() + key[1:]: properties(one) for key, one in value.items()}
    return value


resources = {
    "Task": {"Type": "AWS::ECS::TaskDefinition", "Properties": properties(definition)},
    "Policy": {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": policy}},
}
print(json.dumps({"Resources": resources}))
