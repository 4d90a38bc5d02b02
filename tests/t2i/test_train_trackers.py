"""The training loop and accelerate's trackers: one that notes what it is told, and none installed.

TensorBoard was run by hand; no service has been."""

import accelerate.tracking
import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch import nn

from gencompress.t2i import train
from gencompress.t2i.train import Training, fit


@pytest.fixture
def told(monkeypatch):
    """What a tracker called "noting" was told."""
    calls = []

    class Noting(GeneralTracker):
        name, requires_logging_directory, main_process_only, tracker = "noting", True, True, None

        def __init__(self, project, folder, **more):
            super().__init__()
            calls.append(("start", project, str(folder)))

        def store_init_configuration(self, values):
            calls.append(("config", values))

        def log(self, values, step=None, **more):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "noting", Noting)
    return calls


@pytest.fixture
def how(told):
    return Training(5, 2, log_every=2, save_seconds=0.0, trackers=("noting",))


def trained(how, workdir, fails=False):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def step(number, batch, chance):
        if fails and number == 3:
            raise KeyboardInterrupt
        return {"loss": model(batch["x"]).square().mean()}

    data = [{"x": torch.full((3,), float(i))} for i in range(4)]
    log, _ = fit({"m": model}, step, data, how, workdir, torch.Generator().manual_seed(0))
    return log, model


def test_rows_of_the_log_are_tracked(told, how, tmp_path):
    log, model = trained(how, tmp_path)
    assert told[0] == ("start", "gencompress", train.RUNS) and told[-1] == ("finish",)
    assert told[1][1]["rate"] == how.rate and told[1][1]["betas"] == "[0.9, 0.999]"
    rows = [(step, values) for kind, step, values in (c for c in told if c[0] == "log")]
    assert [step for step, _ in rows] == [2, 4, 5]
    for (_, values), row in zip(rows, log, strict=True):
        assert values == {name: value for name, value in row.items() if name != "kind"}
    # and it changes nothing: neither the weights, nor which checkpoint is taken up
    _, plain = trained(Training(5, 2, log_every=2, save_seconds=0.0), None)
    assert torch.equal(model.weight, plain.weight)
    assert "trackers" in train.FREE


def test_a_run_that_stops_ends_its_tracking(told, how, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(how, tmp_path, fails=True)
    assert told[-1] == ("finish",)


def test_a_tracker_that_is_not_there_is_told():
    if "aim" in map(str, accelerate.tracking.get_available_trackers()):
        pytest.skip("aim is installed")
    with pytest.raises(ValueError, match="aim: not installed"):
        Training(5, 2, trackers=("aim",))
    with pytest.raises(ValueError, match="odd"):
        Training(5, 2, trackers=("odd",))
