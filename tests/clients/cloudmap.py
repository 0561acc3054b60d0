"""The life of namespaces, services, instances, health and discovery, by boto3.

Usage: cloudmap.py ENDPOINT [--moto]. Prints one line per step. With --moto, the endpoint is moto's
server, and what it does not do is left out: what is printed must be the same line for line.
"""

import sys

import boto3
from botocore.config import Config

endpoint, moto = sys.argv[1], "--moto" in sys.argv[2:]
# DiscoverInstances would go to a host data-127.0.0.1.
config = Config(inject_host_prefix=False, retries={"total_max_attempts": 1})
aws = boto3.client(
    "servicediscovery",
    endpoint_url=endpoint,
    region_name="us-east-1",
    aws_access_key_id="any",
    aws_secret_access_key="any",
    config=config,
)


def shows(step, value):
    print(f"{step}: {value}", flush=True)


def refused(step, exception, call, **arguments):
    try:
        call(**arguments)
        shows(step, "not refused")
    except getattr(aws.exceptions, exception) as error:
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 400
        assert moto or error.response["Error"]["Message"], "a message"
        shows(step, exception)


def pages(call, key, **arguments):
    return list(aws.get_paginator(call).paginate(**arguments).search(f"{key}[]"))


def done(answer):
    operation = aws.get_operation(OperationId=answer["OperationId"])["Operation"]
    assert operation["Status"] == "SUCCESS", operation
    return operation


create = aws.create_http_namespace(Name="http.example", CreatorRequestId="one", Description="d")
http = done(create)["Targets"]["NAMESPACE"]
shows("namespace created", done(create)["Type"])
create = aws.create_private_dns_namespace(Name="dns.example", Vpc="vpc-1")
dns = done(create)["Targets"]["NAMESPACE"]
found = aws.get_namespace(Id=http)["Namespace"]
shows("namespace", (found["Name"], found["Type"], found["Description"], found["CreateDate"].year > 2000))
shows("namespaces", sorted((one["Name"], one["Type"]) for one in pages("list_namespaces", "Namespaces")))
if not moto:
    # moto lists operations and namespaces without all of the filters.
    named = [{"Name": "NAME", "Values": ["dns.example"], "Condition": "EQ"}]
    assert [one["Id"] for one in pages("list_namespaces", "Namespaces", Filters=named)] == [dns]
    again = aws.create_http_namespace(Name="http.example", CreatorRequestId="one", Description="d")
    assert again["OperationId"] == aws.list_operations()["Operations"][0]["Id"], "idempotent"
    refused("same request id", "DuplicateRequest", aws.create_http_namespace, Name="x", CreatorRequestId="one")
    refused("namespace again", "NamespaceAlreadyExists", aws.create_http_namespace, Name="http.example")
    refused("no dns name", "InvalidInput", aws.create_http_namespace, Name="a..b")
refused("no namespace", "NamespaceNotFound", aws.get_namespace, Id="ns-none")
refused("no service", "ServiceNotFound", aws.get_service, Id="srv-none")
refused("no operation", "OperationNotFound", aws.get_operation, OperationId="none")

health = {"HealthCheckCustomConfig": {"FailureThreshold": 1}}
service = aws.create_service(Name="echo", NamespaceId=http, Tags=[{"Key": "k", "Value": "v"}], **health)["Service"]
echo = service["Id"]
shows("service", (service["Name"], service["NamespaceId"] == http, service["HealthCheckCustomConfig"]))
records = {"RoutingPolicy": "MULTIVALUE", "DnsRecords": [{"Type": "A", "TTL": 10}, {"Type": "SRV", "TTL": 10}]}
other = aws.create_service(Name="other", NamespaceId=dns, DnsConfig=records)["Service"]
shows("records", (other["DnsConfig"]["RoutingPolicy"], [one["Type"] for one in other["DnsConfig"]["DnsRecords"]]))
shows("services", sorted(one["Name"] for one in pages("list_services", "Services")))
of_http = [{"Name": "NAMESPACE_ID", "Values": [http], "Condition": "EQ"}]
if not moto:
    shows("services of one", [one["Name"] for one in pages("list_services", "Services", Filters=of_http)])
done(aws.update_service(Id=other["Id"], Service={"Description": "new", "DnsConfig": {"DnsRecords": records["DnsRecords"]}}))
shows("updated", aws.get_service(Id=other["Id"])["Service"]["Description"])
aws.update_service_attributes(ServiceId=echo, Attributes={"mesh.port": "80", "team": "a"})
aws.delete_service_attributes(ServiceId=echo, Attributes=["team"])
shows("attributes", aws.get_service_attributes(ServiceId=echo)["ServiceAttributes"]["Attributes"])
shows("tags", aws.list_tags_for_resource(ResourceARN=service["Arn"])["Tags"])
if not moto:
    refused("service again", "ServiceAlreadyExists", aws.create_service, Name="echo", NamespaceId=http)
    refused("in use", "ResourceInUse", aws.delete_namespace, Id=http)
    refused("setting", "InvalidInput", aws.update_service_attributes, ServiceId=echo, Attributes={"mesh.port": "-1"})
    refused("no resource", "ResourceNotFoundException", aws.list_tags_for_resource, ResourceARN="arn:x")
    refused("no SRV", "InvalidInput", aws.register_instance, ServiceId=other["Id"], InstanceId="a",
            Attributes={"AWS_INSTANCE_IPV4": "10.0.0.1"})


def register(id, **attributes):
    at = {"AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": "31080"}
    return aws.register_instance(ServiceId=echo, InstanceId=id, Attributes={**at, **attributes})


def discover(**how):
    found = aws.discover_instances(NamespaceName="http.example", ServiceName="echo", **how)
    return sorted(one["InstanceId"] for one in found["Instances"])


shows("registered", done(register("a", stage="x"))["Type"])
register("b", stage="x", AWS_INSTANCE_PORT="31081")
register("c", stage="y", AWS_INSTANCE_PORT="31082")
shows("instance", aws.get_instance(ServiceId=echo, InstanceId="a")["Instance"]["Attributes"])
shows("instances", sorted(one["Id"] for one in pages("list_instances", "Instances", ServiceId=echo)))
if not moto:
    # moto's tokens are its own.
    shows("by pages", len(pages("list_instances", "Instances", ServiceId=echo, PaginationConfig={"PageSize": 2})))
for id in "bc":
    aws.update_instance_custom_health_status(ServiceId=echo, InstanceId=id, Status="UNHEALTHY")
status = aws.get_instances_health_status(ServiceId=echo, Instances=["a", "b"])["Status"]
shows("health", sorted(status.items()))
for status in ["HEALTHY", "UNHEALTHY", "ALL", "HEALTHY_OR_ELSE_ALL"]:
    shows(status, discover(HealthStatus=status))
shows("query", discover(QueryParameters={"stage": "y"}, HealthStatus="ALL"))
if not moto:
    shows("optional", (discover(OptionalParameters={"stage": "y"}, HealthStatus="ALL"),
                       discover(OptionalParameters={"stage": "z"}, HealthStatus="ALL")))
    shows("else all", discover(QueryParameters={"stage": "y"}))
    shows("most", len(discover(HealthStatus="ALL", MaxResults=1)))
names = {"NamespaceName": "http.example", "ServiceName": "echo"}
before = aws.discover_instances_revision(**names)["InstancesRevision"]
register("d", AWS_INSTANCE_PORT="31083")
shows("revision grows", aws.discover_instances_revision(**names)["InstancesRevision"] > before)
refused("discover nowhere", "NamespaceNotFound", aws.discover_instances, NamespaceName="none", ServiceName="echo")
refused("discover nobody", "ServiceNotFound", aws.discover_instances, NamespaceName="http.example", ServiceName="none")
refused("no instance", "InstanceNotFound", aws.get_instance, ServiceId=echo, InstanceId="none")
refused("deregister none", "InstanceNotFound", aws.deregister_instance, ServiceId=echo, InstanceId="none")
at = {"AWS_INSTANCE_IPV4": "10.0.0.1", "AWS_INSTANCE_PORT": "80"}
done(aws.register_instance(ServiceId=other["Id"], InstanceId="o", Attributes=at))
if not moto:
    refused("no custom health", "CustomHealthNotFound", aws.update_instance_custom_health_status,
            ServiceId=other["Id"], InstanceId="o", Status="HEALTHY")
done(aws.deregister_instance(ServiceId=other["Id"], InstanceId="o"))
if not moto:
    for address in ["169.254.169.254", "127.128.0.1", "224.0.0.1", "10.0.0.256", "\u00e9"]:
        refused(f"address {address}", "InvalidInput", register, id="e", AWS_INSTANCE_IPV4=address)
    for port in ["-1", "0", "65536", "http"]:
        refused(f"port {port}", "InvalidInput", register, id="e", AWS_INSTANCE_PORT=port)
    refused("service in use", "ResourceInUse", aws.delete_service, Id=echo)

for id in "abcd":
    done(aws.deregister_instance(ServiceId=echo, InstanceId=id))
shows("none left", discover(HealthStatus="ALL"))
for id in [echo, other["Id"]]:
    aws.delete_service(Id=id)
for id in [http, dns]:
    shows("namespace deleted", done(aws.delete_namespace(Id=id))["Type"])
shows("nothing left", pages("list_namespaces", "Namespaces"))
