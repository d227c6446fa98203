"""What programs cost: FLOPs, memory, and the chips that they run on."""
