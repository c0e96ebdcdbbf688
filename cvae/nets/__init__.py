"""Networks: encoders, decoders and their layers."""
