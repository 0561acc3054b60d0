"""dnspython: the address of each name in a family, as "name 4 name 6 …"."""
import sys

import dns.exception
import dns.resolver

questions = iter(sys.argv[1:])
for name, family in zip(questions, questions):
    try:
        print(dns.resolver.resolve(name, "AAAA" if family == "6" else "A", search=True)[0].address)
    except dns.exception.DNSException as error:
        print(type(error).__name__)
