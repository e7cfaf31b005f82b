"""DeepSpeed: build, gather, step, checkpoint. Nothing else imports deepspeed."""
