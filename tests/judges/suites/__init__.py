"""Public test suites of other servers and SDKs, run black box against a gateway."""
