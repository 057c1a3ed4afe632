"""The small GLM-5-architecture model: shape, training forward pass, data, training, export."""
