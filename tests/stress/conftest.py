import pytest


@pytest.fixture(scope="session")
def cases(request):
    """How many cases to run of how many: all of them, or a share to rehearse."""
    return lambda full: max(1, round(full * request.config.getoption("--stress-share")))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A run that nobody disturbs, and the seconds it takes."""
    from tests.stress.running import STEPS, Run

    run, warm_up = (Run(tmp_path_factory.mktemp("undisturbed"), {}) for _ in range(2))
    warm_up.finish()  # the first one waits until everything is imported
    seconds = run.finish()
    assert run.metrics()["train/steps"] == STEPS
    return run, seconds


@pytest.fixture
def tell(capsys, request):
    """Print a figure for the table of docs/runs.md, past pytest's capturing."""

    def tell(text):
        with capsys.disabled():
            print(f"\n{request.node.name}: {text}")

    return tell
