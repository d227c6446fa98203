"""What runs on devices: mesh, compiled programs, trainer, sampler, checkpoints."""
