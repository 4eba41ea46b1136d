"""Plans fitted to one denoiser, and the ensembles of hand-made plans that they are measured against."""
