"""Fused kernels for LoRA fine-tuning and RLHF."""
