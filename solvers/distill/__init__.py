"""Distillation: the objectives that take a diffusion or flow model to one to four calls.

Trainer-free: each objective is a function of a student, a teacher, a batch, its times and its noise, and returns a
loss. Optimisers, data, parallel wrappers and precision stay the caller's. One module per method:

    progressive             two teacher steps in one, halving again and again  (Salimans & Ho 2022)
    guided                  the guidance scale becomes an input                (Meng et al. 2023)
    consistency             distillation, training, improved training          (Song et al. 2023; Song & Dhariwal 2023)
    continuous              its limit of ever more levels, sCM                 (Lu & Song 2024)
    latent_consistency      guided consistency distillation over long jumps    (Luo et al. 2023)
    adversarial             hinge loss on frozen features plus distillation    (Sauer et al. 2023)
    rectified               flow matching, reflow and one-step distillation    (Liu et al. 2022, 2023)
    distribution_matching   the difference of two scores as gradient           (Yin et al. 2024)

and what they share: `network` (a denoiser in a batch of points), `jumps` (a teacher's way over intervals, as plans),
`boundary` (consistency scalings), `curricula`, `losses`, `ema`, `lora`.

A student or teacher is a `fewstep.Denoiser` around the caller's module, plain or wrapped for parallel training.
"""
