"""The model: a conditional VAE with an analytic decoder variance and a conditional prior.

It needs torch and the standard library only. Letters in shapes: B images of a batch, C channels,
H = W pixels of a side, P = C*H*W, A attributes, D latent dimensions, E size of e(y).
Images are in [-1, 1]. Values are in nats per image unless their name says otherwise.
"""
