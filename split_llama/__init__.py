"""What both parties share: the model core, the engine, the wire, the transports and the noise."""
