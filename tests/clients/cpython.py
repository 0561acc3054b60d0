"""Runs CPython's own tests of these modules, and prints how each of them ended.

Without those of sockets between virtual machines, which hang on some machines, and without any
that need another host.
"""

import sys
import unittest
from test import support

support.use_resources = []


class Result(unittest.TestResult):
    def stopTest(self, test):
        super().stopTest(test)
        ended = "skipped" if self.skipped and self.skipped[-1][0] is test else "ok"
        if any(failed is test for failed, _ in self.failures + self.errors):
            ended = "failed"
        print(test.id(), ended, flush=True)


def tests(suite):
    for test in suite:
        yield from tests(test) if isinstance(test, unittest.TestSuite) else [test]


every = tests(unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:]))
unittest.TestSuite(test for test in every if "VSOCK" not in test.id()).run(Result())
