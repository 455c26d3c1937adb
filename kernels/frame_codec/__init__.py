"""Rows of wire frames to and from the batch, on the device."""
