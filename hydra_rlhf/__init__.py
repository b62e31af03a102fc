"""RLHF with PPO on one base model."""

__version__ = "0.1.0"
