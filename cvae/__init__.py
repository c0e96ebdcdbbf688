"""The model: a conditional VAE with an analytic decoder variance and a conditional prior. Torch and the standard library only.

Shapes: B images of a batch, C channels, H = W pixels, P = C*H*W, A attributes, D latent dimensions, E size of e(y).
Images are in [-1, 1]; everything reported is in nats per image unless its name says otherwise.
"""
