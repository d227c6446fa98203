"""What runs on devices: mesh, jitted steps, sampler, checkpoints, metrics."""
