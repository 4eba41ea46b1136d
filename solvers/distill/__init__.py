"""Distillation objectives: from a diffusion or flow model to one that samples in one to four calls.

Each objective is a function of a student, a teacher, a batch, its times and its noise, and returns a loss. Optimisers,
data, parallel wrappers and precision are the caller's. One module per method:

    progressive             one student step for two teacher steps, repeated   (Salimans & Ho 2022)
    guided                  the guidance scale as a network input              (Meng et al. 2023)
    consistency             distillation, training, improved training          (Song et al. 2023; Song & Dhariwal 2023)
    continuous              continuous-time consistency models, sCM            (Lu & Song 2024)
    latent_consistency      guided consistency distillation over long steps    (Luo et al. 2023)
    adversarial             hinge loss on frozen features plus distillation    (Sauer et al. 2023)
    rectified               flow matching, reflow and one-step distillation    (Liu et al. 2022, 2023)
    distribution_matching   the difference of two scores as the gradient       (Yin et al. 2024)
    mean_flow               the average velocity, by one derivative            (Geng et al. 2025)
    shortcut                one step for two of half the length                (Frans et al. 2024)
    flow_maps               flow maps in continuous time, AYF                  (Sabour et al. 2025)

    moment_matching         groups of samples by a kernel, IMM                 (Zhou et al. 2025)
    score_identity          the Fisher divergence of two scores, SiD           (Zhou et al. 2024)
    f_divergence            weights of distribution matching, f-distill        (Xu et al. 2025)
    latent_adversarial      heads on the teacher's own noised features, LADD   (Sauer et al. 2024)
    regularised             sCM and distribution matching together, rCM        (Zheng et al. 2025)
    trajectory_matching     distribution matching at every step, TDM           (Luo et al. 2025)

Shared: `network` (a denoiser on a batch with a point per sample), `two_times` (students told the end of a step),
`jumps` (a teacher's steps over the intervals of a grid, as plans), `boundary` (consistency scalings), `curricula`,
`losses`, `ema`, `lora`.

A student or teacher is a `fewstep.Denoiser` around the caller's module, plain or wrapped for parallel training.
"""

from fewstep.solvers.options import needs

needs("fewstep.solvers.distill", "torch", extra="torch")
