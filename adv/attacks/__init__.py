"""Attacks: functions that take a model, inputs and labels and return perturbed inputs."""
