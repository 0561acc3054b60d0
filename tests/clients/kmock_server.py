"""kmock's Kubernetes, until it is killed: kmock_server.py ADDRESS PORT."""

import asyncio
import sys

from kmock import KubernetesEmulator, ResourceInfo, Server, resource

address, port = sys.argv[1:]
RESOURCES = {
    resource("", "v1", "nodes"): ResourceInfo(kind="Node", namespaced=False),
    resource("", "v1", "services"): ResourceInfo(kind="Service", namespaced=True),
    resource("discovery.k8s.io", "v1", "endpointslices"): ResourceInfo(kind="EndpointSlice", namespaced=True),
}


async def main():
    async with KubernetesEmulator() as kubernetes, Server(kubernetes, address, int(port)):
        for name, info in RESOURCES.items():
            kubernetes.resources[name] = info
        await asyncio.Event().wait()


asyncio.run(main())
