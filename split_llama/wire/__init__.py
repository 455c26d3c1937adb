"""Frames: header, tensor codecs, control payloads.

frame     the header, cutting a message into frames and joining frames into one
codec     rows of hidden states as bytes and back
step      the payload of a STEP: tree bits, accepted nodes, rows
control   the JSON payloads, and errors as frames
"""
