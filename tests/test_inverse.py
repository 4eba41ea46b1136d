"""Images to latents and back: DDIM inversion of the digits with the trained network, and slerp of latents."""

import numpy as np
import pytest

import fewstep as fs

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

PER_CLASS = 4


@pytest.fixture(scope="module")
def digits():
    """(images (40, 1, 8, 8), labels, denoiser): four real digits of each class in turn."""
    from fewstep.bindings.unet import digits_model
    from fewstep.digits_data import load_digits

    images, of = load_digits()
    chosen = np.concatenate([np.flatnonzero(of == c)[:PER_CLASS] for c in range(10)])
    denoiser = fs.Denoiser(digits_model(), fs.VP.linear(), "v")
    return torch.from_numpy(images[chosen]).float(), torch.from_numpy(of[chosen]), denoiser


def encode(digits, steps):
    images, labels, denoiser = digits
    grid = fs.grid(denoiser.process, steps, "quadratic")
    return fs.sample(denoiser, images, solver="ddim_inverse", grid=grid, cond={"label": labels})


def decode(digits, latents, steps, labels=None):
    denoiser = digits[2]
    grid = fs.grid(denoiser.process, steps, "quadratic")
    cond = {"label": digits[1] if labels is None else labels}
    return fs.sample(denoiser, latents, solver="ddim", grid=grid, cond=cond)


def rms(x):
    return float(x.double().pow(2).mean().sqrt())


def test_an_image_comes_back_from_its_latent(digits):
    errors = [rms(decode(digits, encode(digits, steps), steps) - digits[0]) for steps in (20, 40, 80)]
    assert errors[-1] < 0.03  # of images in [-1, 1]
    # First order: half the error for twice the steps.
    assert 1.5 < errors[0] / errors[1] < 2.2
    assert 1.5 < errors[1] / errors[2] < 2.2


def test_a_latent_is_the_images_own(digits):
    """Decoding from another latent does not reproduce the image."""
    latents = encode(digits, 40)
    assert rms(decode(digits, latents.roll(1, 0), 40) - digits[0]) > 0.3


def test_the_arc_between_two_latents_is_of_digits(digits):
    """Slerp between the latents of two images of a class gives digits of that class; the ends are the images."""
    from sklearn.svm import SVC

    from fewstep.digits_data import load_digits

    images, of = load_digits()
    judge = SVC(gamma=0.02).fit(images.reshape(len(images), -1), of)
    latents = encode(digits, 80).reshape(10, PER_CLASS, 1, 8, 8)
    a, b, labels = latents[:, 0], latents[:, 1], torch.arange(10)
    right = 0
    for weight in (0.0, 0.25, 0.5, 0.75, 1.0):
        between = fs.slerp(a, b, weight)
        made = decode(digits, between, 80, labels).numpy()
        right += int((judge.predict(made.reshape(10, -1)) == labels.numpy()).sum())
        if weight in (0.0, 1.0):
            image = digits[0].reshape(10, PER_CLASS, 1, 8, 8)[:, int(weight)]
            assert rms(torch.from_numpy(made) - image) < 0.04
    assert right >= 48  # of 50


def test_slerp_keeps_the_noise_level_that_a_mean_loses():
    a, b = (torch.from_numpy(np.random.default_rng(s).standard_normal((8, 3, 64, 64))).float() for s in (0, 1))
    lengths = fs.slerp(a, b, 0.5).flatten(1).norm(dim=1) / np.sqrt(3 * 64 * 64)
    assert torch.allclose(lengths, torch.ones(8), atol=0.02)
    assert float(((a + b) / 2).std()) == pytest.approx(np.sqrt(0.5), abs=0.01)


def test_slerp_is_the_arc():
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    for weight in (0.0, 0.3, 1.0):
        angle = weight * np.pi / 2
        wanted = [[np.cos(angle), 2.0 * np.sin(angle)]]
        np.testing.assert_allclose(fs.slerp(a, b, weight), wanted, atol=1e-12)
    np.testing.assert_allclose(fs.slerp(a, 3.0 * a, 0.25), [[1.5, 0.0]], atol=1e-12)  # parallel: on the line
    assert fs.slerp(a.astype(np.float16), b.astype(np.float16), 0.5).dtype == np.float16


@pytest.mark.parametrize(
    ("a", "b", "weight", "error", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 2)), 1.5, ValueError, "weight"),
        (np.ones((1, 2)), torch.ones((1, 2)), 0.5, TypeError, "one library"),
        (np.ones((1, 2)), np.ones((1, 3)), 0.5, ValueError, r"\(1, 3\)"),
        (np.ones(2), np.ones(2), 0.5, ValueError, r"\(B, \.\.\.\)"),
        (np.ones((1, 2), int), np.ones((1, 2), int), 0.5, ValueError, "int64"),
    ],
)
def test_bad_slerps(a, b, weight, error, message):
    with pytest.raises(error, match=message):
        fs.slerp(a, b, weight)
