"""The implementations of every op. Importing this registers them all."""
