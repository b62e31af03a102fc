"""RLHF with PPO on one base model."""
