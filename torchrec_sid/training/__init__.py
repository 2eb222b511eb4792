"""The training loop: TorchRec's pipeline, progress, checkpoints, evaluation by slice."""
