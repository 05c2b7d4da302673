"""Options of ``pytest benchmarks``."""


def pytest_addoption(parser):
    group = parser.getgroup("sfpk")
    group.addoption(
        "--bench-size", choices=("quick", "default", "full"), default="default", help="of the suite's shapes"
    )
    group.addoption("--bench-device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one")
