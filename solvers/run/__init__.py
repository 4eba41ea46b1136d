"""Running a plan: arrays and devices, the engines of each backend, CUDA graphs, the sampler and the adaptive loop."""
