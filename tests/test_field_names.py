"""Names of solvers, spacings and methods elsewhere: the error says what to write here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fewstep as fs
from fewstep.distill_runs.methods import PROBLEMS, make_recipe
from fewstep.distill_runs.own_methods import METHODS as OWN
from fewstep.solvers.families.embedded import PAIRS as ADAPTIVE
from fewstep.solvers.field_names import METHODS, PAIRS, SOLVERS, SPACINGS, method_name, solver_hint

GRID = fs.grid(fs.VP.linear(), 4)
FLOW = fs.grid(fs.Flow(), 4)
COMING_FROM = Path(__file__).parents[1] / "docs" / "coming-from.md"


def hint(name: str) -> str | None:
    return solver_hint(name, fs.list_solvers(), fs.list_spacings())


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("karras", "spacing 'karras'"),
        ("FlowMatchEulerDiscreteScheduler", "solver 'euler' on fewstep.Flow()"),
        ("DPM++ 2M Karras", "solver 'dpmpp_2m' with spacing 'karras'"),
        ("UniPCMultistepScheduler", "solver 'unipc'"),
        ("DPMSolverMultistepScheduler", "solver 'dpmpp_2m'"),
        ("KDPM2AncestralDiscreteScheduler", "solver 'dpm2_ancestral'"),
        ("dpmpp_2m_karras", "solver 'dpmpp_2m' with spacing 'karras'"),
        ("euler_a", "solver 'euler_ancestral'"),
        ("ddim_uniform", "spacing 'ddim_uniform'"),
        ("k_dpm_2_a", "solver 'dpm2_ancestral'"),
        ("dpmpp_3m_sde_gpu", "solver 'dpmpp_3m_sde'"),
        ("sample_dpmpp_2s_ancestral", "solver 'dpmpp_2s_ancestral'"),
        ("PLMS", "solver 'pndm' with skip_prk=True"),
        ("dopri5", "fewstep.sample_adaptive with solver='dormand_prince'"),
    ],
)
def test_the_error_says_what_a_name_elsewhere_is_here(name: str, here: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown solver {name!r}: did you mean {here}?")):
        fs.plan(name, GRID)


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("use_karras_sigmas", "spacing 'karras'"),
        ("SGM Uniform", "spacing 'sgm_uniform'"),
        ("edm", "spacing 'karras'"),
        ("euler_a", "solver 'euler_ancestral'"),
        ("karass", "'karras'"),
    ],
)
def test_the_error_of_a_spacing(name: str, here: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unknown spacing {name!r}: did you mean {here}?")):
        fs.grid(fs.VP.linear(), 4, name)


def test_a_misspelt_name_is_matched_by_its_letters() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'ddim_inverse'"):
        fs.plan("ddim_invers", GRID)
    assert hint("nonsense") is None


def test_every_hint_can_be_followed() -> None:
    # An alias that is a name here would never be reached, and a hint of a name that is gone would mislead.
    for kind, table, known in (
        ("solver", SOLVERS, fs.list_solvers()),
        ("spacing", SPACINGS, fs.list_spacings()),
        ("method", METHODS, (*OWN, *PROBLEMS["ring"].methods)),
        ("adaptive", PAIRS, tuple(ADAPTIVE)),
    ):
        for here, elsewhere in table.items():
            assert not {name.strip() for name in elsewhere.split(",")} & set(known), (kind, elsewhere)
            if here.isidentifier():
                assert here in known, (kind, here)
    for text in SOLVERS:
        made = re.fullmatch(r"solver '(\w+)'(?: with (\w+)=(\S+))?( on fewstep\.Flow\(\))?", text)
        if made is not None:
            option = {made[2]: {"True": True, "1.0": 1.0}.get(made[3], made[3].strip("'"))} if made[2] else {}
            assert fs.plan(made[1], FLOW if made[4] else GRID, **option).nfe >= 4


def test_the_schedulers_and_samplers_of_the_page_are_known() -> None:
    page = COMING_FROM.read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+Scheduler`(?:, )?)+) \| (.*) \|$", page, re.M)
    assert len(rows) >= 10
    for names, here in rows:
        if "spacing=" in here:
            continue
        for name in re.findall(r"`(\w+)`", names):
            found = re.match(r"solver '(\w+)'", hint(name) or "")
            assert found is not None, name
            assert f'"{found[1]}"' in here, name
    (row,) = re.findall(r"^\| (`dpm_2`.*) \| (.*) \|$", page, re.M)
    for there, here in zip(*(re.findall(r"`(\w+)`", cell) for cell in row), strict=True):
        assert (hint(there) or "").startswith(f"solver '{here}'")


def test_methods_of_distillation() -> None:
    with pytest.raises(ValueError, match=r"'dmd2': did you mean 'distribution_matching'\?"):
        make_recipe("dmd2", "ring")
    with pytest.raises(ValueError, match=r"'LCM': did you mean 'latent_consistency', on digits\?"):
        make_recipe("LCM", "ring")
    with pytest.raises(ValueError, match=r"unknown method 'SDXL-Turbo': did you mean 'adversarial'\?"):
        fs.Trainer("SDXL-Turbo", data=None)
    assert method_name("nonsense") is None


def test_adaptive_solvers() -> None:
    denoiser = fs.Denoiser(lambda x, t: x, fs.VP.linear())
    with pytest.raises(ValueError, match=r"unknown adaptive solver 'dopri5': did you mean 'dormand_prince'\?"):
        fs.sample_adaptive(denoiser, shape=(1, 2), seed=0, solver="dopri5")


@pytest.mark.parametrize("name", ["unipc", "UniPCMultistepScheduler"])
def test_a_solver_is_no_plan_of_a_pipeline(name: str) -> None:
    pytest.importorskip("diffusers")
    from fewstep.bindings.diffusers.plan_scheduler import read

    with pytest.raises(ValueError, match=rf"plan = '{name}' is no file but a name, of solver 'unipc': make the plan"):
        read(name)
