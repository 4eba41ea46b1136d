"""Plans fitted to one denoiser, and the hand-made plans that they are compared with."""
