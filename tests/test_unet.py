"""The shipped digits network: its accuracy, the checks of its loader, and its training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
neighbors = pytest.importorskip("sklearn.neighbors")

from fewstep.bindings.unet import NO_CLASS, UNet, digits_model, load_unet  # noqa: E402
from reports import train_digits  # noqa: E402

WEIGHTS = Path(train_digits.__file__).parent.parent / "api" / "weights"


@pytest.fixture(autouse=True, scope="module")
def quick_training():
    """One noise draw per image in the validation, and the one thread that each process of pytest has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_digits, "VALIDATION_DRAWS", 1)
        patch.setattr(torch, "set_num_threads", lambda threads: None)
        yield


@pytest.fixture(scope="module")
def net():
    return digits_model()


@pytest.fixture(scope="module")
def held():
    return train_digits.load_split()[1]


def noisy(held, t, seed=0):
    """(x, alpha, sigma, t as a batch) for the held-out digits at one time."""
    times = torch.full((len(held.x),), t)
    x, _ = train_digits.noised(held.x, times, torch.Generator().manual_seed(seed))
    alpha, sigma = train_digits.levels(times)
    return x, alpha, sigma, times


def test_shipped_weights_are_small_and_frozen(net):
    assert 300_000 <= sum(p.numel() for p in net.parameters()) <= 1_000_000
    assert (WEIGHTS / "digits.safetensors").stat().st_size < 4_000_000
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_log_describes_the_shipped_weights(net, held):
    log = json.loads((WEIGHTS / "digits.json").read_text())
    assert log["parameters"] == sum(p.numel() for p in net.parameters())
    assert log["steps_done"] == log["settings"]["steps"]
    bands = train_digits.validation_loss(net, held)
    logged = [band["loss"] for band in log["validation"]["bands"]]
    # The log has 4 noise draws an image, this has 1: a few percent apart, untrained weights far off.
    np.testing.assert_allclose(bands, logged, rtol=0.08)
    for guidance in ("guidance_1", "guidance_2"):
        assert log["evaluation"][guidance]["accuracy"] >= 0.95


SHARES = [(50.0, 0.5), (200.5, 0.5), (400.0, 0.5), (650.25, 0.6), (900.0, 0.8)]


# Mean squared error of the x0 prediction at most this share of the best pixelwise affine predictor's, which
# knows each pixel's mean and variance: mean + gain (x - alpha mean), so the constant mean where noise is all.
@pytest.mark.parametrize(("t", "share"), SHARES)
def test_denoises_digits_it_never_saw(net, held, t, share):
    x, alpha, sigma, times = noisy(held, t)
    train, _ = train_digits.load_split()
    mean, variance = train.x.mean(0), train.x.var(0)
    affine = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
    predicted = alpha * x - sigma * net(x, times, held.label)
    error, trivial = ((guess - held.x).square().mean().item() for guess in (predicted, affine))
    print(f"t={t}: {error:.4f} against {trivial:.4f}, {error / trivial:.3f}")
    assert error < share * trivial


def test_the_class_helps_and_no_class_is_the_default(net, held):
    x, alpha, sigma, times = noisy(held, 700.0)

    def error(label):
        return (alpha * x - sigma * net(x, times, label) - held.x).square().mean().item()

    wrong = (held.label + 1) % 10
    none = torch.full_like(held.label, NO_CLASS)
    print(error(held.label), error(none), error(wrong))
    assert error(held.label) < 0.9 * error(none) < 0.9 * 0.9 * error(wrong)
    assert torch.equal(net(x, times), net(x, times, none))


def test_guided_samples_are_read_as_their_class(net):
    """20 DDIM steps, guidance 2, six images a class, judged by the three nearest real digits."""
    train, _ = train_digits.load_split()
    label = torch.arange(10).repeat(6)
    made = train_digits.ddim(net, label, 2.0, 20, torch.Generator().manual_seed(0))
    judge = neighbors.KNeighborsClassifier(3).fit(train.x.flatten(1), train.label)
    assert judge.score(made.flatten(1), label) >= 0.95
    # And they differ within a class, about as real ones do (3.4 to 5.2 apart in the mean).
    apart = [torch.pdist(made[label == k].flatten(1)).mean().item() for k in range(10)]
    assert min(apart) > 2.5


def test_each_sample_has_its_own_time(net, held):
    times = torch.tensor([0.0, 3.7, 250.0, 640.25, 999.0])
    x, label = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)), held.label[:5]
    together = net(x, times, label)
    alone = torch.cat([net(x[i : i + 1], times[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    # The times matter: rolled by one place, the outputs differ by far more than the tolerance above.
    assert (net(x, times.roll(1), label) - together).flatten(1).abs().amax(1).min() > 0.05


def test_is_smooth_in_time(net, held):
    """High-order solvers need derivatives in t: second differences shrink fourfold as the spacing halves."""
    double = digits_model().double()
    x, label = noisy(held, 300.0)[0][:8].double(), held.label[:8]

    def second_difference(h):
        v = [double(x, torch.full((8,), 300.0 + k * h, dtype=torch.float64), label) for k in (-1, 0, 1)]
        return (v[0] - 2.0 * v[1] + v[2]).norm().item()

    assert second_difference(2.0) / second_difference(1.0) == pytest.approx(4.0, rel=0.05)


def good_state():
    return {name: value.clone() for name, value in UNet().state_dict().items()}


def test_loads_what_it_saved(tmp_path, held):
    torch.manual_seed(0)
    net = UNet()
    torch.nn.init.normal_(net.leave.weight)  # initialised to zero, which would hide the other layers
    safetensors_torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    x, _, _, times = noisy(held, 500.0)
    assert torch.equal(load_unet(tmp_path / "w.safetensors")(x, times), net(x, times))


def drop(state):
    del state["time.0.weight"]


def add(state):
    state["extra"] = torch.zeros(1)


def reshape(state):
    state["enter.weight"] = torch.zeros(32, 3, 3, 3)


def recast(state):
    state["enter.bias"] = state["enter.bias"].half()


def poison(state):
    state["norm.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop, r"time\.0\.weight is missing"),
        (add, r"extra is not a parameter"),
        (reshape, r"enter\.weight is \(32, 3, 3, 3\) torch\.float32, not \(32, 1, 3, 3\) torch\.float32"),
        (recast, r"enter\.bias is \(32,\) torch\.float16, not \(32,\) torch\.float32"),
        (poison, r"norm\.bias has NaN or inf"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, spoil, says):
    state = good_state()
    spoil(state)
    safetensors_torch.save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=rf"odd\.safetensors does not hold the weights of UNet\(\): {says}$"):
        load_unet(tmp_path / "odd.safetensors")


def test_only_the_first_few_mismatches_are_listed(tmp_path):
    safetensors_torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"a is not a parameter; (\S+ is missing; ){2}and \d+ more$"):
        load_unet(tmp_path / "other.safetensors")


def test_truncated_file(tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes((WEIGHTS / "digits.safetensors").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"half\.safetensors is not a complete safetensors file"):
        load_unet(path)


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    torch.save({"state": Bomb(tmp_path / "ran")}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt is not a complete safetensors file .* pickled weights"):
        load_unet(tmp_path / "net.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors; `make weights`"):
        load_unet(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "new"
    train_digits.main(["--steps", "12", "--seed", "3", "--samples", "0", "--out", str(out)])
    return out


def test_a_few_steps_reduce_the_loss_and_leave_two_files(trained, held):
    assert sorted(p.name for p in trained.iterdir()) == ["digits.json", "digits.safetensors"]
    log = json.loads((trained / "digits.json").read_text())
    before, after = (
        train_digits.overall(train_digits.validation_loss(net, held))
        for net in (UNet().eval(), load_unet(trained / "digits.safetensors"))
    )
    assert log["validation"]["loss"] == pytest.approx(after)
    assert after < 0.85 * before
    assert log["curve"][-1]["step"] == log["steps_done"] == 12
    assert log["settings"]["seed"] == 3


def test_one_seed_gives_one_result(trained, tmp_path):
    train_digits.train(train_digits.TrainingSettings(steps=12, seed=3, samples=0), tmp_path)
    nets = [load_unet(folder / "digits.safetensors").state_dict() for folder in (tmp_path, trained)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_an_interrupt_keeps_the_steps_done(tmp_path, monkeypatch):
    calls = iter(range(1000))
    noised = train_digits.noised

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return noised(*args)

    monkeypatch.setattr(train_digits, "noised", interrupted)
    log = train_digits.train(train_digits.TrainingSettings(steps=500), tmp_path)
    assert log["steps_done"] == 2
    assert "evaluation" not in log
    load_unet(tmp_path / "digits.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "digits.json"
    path.write_text("old")

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train_digits.write_whole(path, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["digits.json"]
    assert path.read_text() == "old"


def test_steps_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_digits.main(["--steps", "0"])
    assert "0 is not a positive number of steps" in capsys.readouterr().err
