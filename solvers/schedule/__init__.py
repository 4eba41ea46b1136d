"""Where and when a sampler calls the network: processes, grids, spacings, and the Brownian tree of its noise."""
