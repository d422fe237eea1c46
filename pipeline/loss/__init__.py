"""Losses and layer matching: functions of tensors. Nothing here knows models or files."""
