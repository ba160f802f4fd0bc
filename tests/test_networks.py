import pytest
import torch

from lightning_vae import ConvDecoder, ConvEncoder, LinearDecoder, LinearEncoder, MLPDecoder, MLPEncoder


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 64, 64), (1, 33, 50), (3, 33, 50), (1, 8, 8), (1, 1, 1), (3, 7, 5)])
@pytest.mark.parametrize("channels", [(4,), (4, 8), (4, 8, 8, 8)])
def test_convolutions_take_any_size(shape, channels):
    encoder = ConvEncoder(shape, latent_dim=5, channels=channels, hidden=16)
    decoder = ConvDecoder(5, shape, channels=channels, hidden=16)
    mean, log_variance = encoder(torch.randn(2, *shape))
    assert mean.shape == log_variance.shape == (2, 5)
    assert decoder(mean).shape == (2, *shape)


@pytest.mark.parametrize(("encoder", "decoder"), [(LinearEncoder, LinearDecoder), (MLPEncoder, MLPDecoder)])
@pytest.mark.parametrize("shape", [(6,), (1, 8, 8), (3, 5, 4)])
def test_linear_and_mlp_take_any_shape(encoder, decoder, shape):
    mean, log_variance = encoder(shape, 5)(torch.randn(2, *shape))
    assert mean.shape == log_variance.shape == (2, 5)
    assert decoder(5, shape)(mean).shape == (2, *shape)


def test_networks_have_the_layers_asked_for():
    widths = [tuple(p.shape) for p in MLPEncoder((6,), 2, hidden=(10, 7)).parameters() if p.ndim == 2]
    assert widths == [(10, 6), (7, 10), (4, 7)]
    kernels = [tuple(p.shape[:2]) for p in ConvEncoder((3, 8, 8), 2, channels=(4, 6)).parameters() if p.ndim == 4]
    assert kernels == [(4, 3), (6, 4)]


def test_linear_encoder_shares_its_variance():
    _, log_variance = LinearEncoder((6,), 3)(torch.randn(4, 6))
    assert (log_variance == log_variance[0]).all()


def test_a_condition_joins_the_features_of_the_convolutions():
    encoder, called = ConvEncoder((1, 8, 8), 2, channels=(4, 6), condition_dim=3), []
    x, conditions = torch.randn(5, 1, 8, 8), torch.eye(3)
    encoder.layers.register_forward_hook(lambda *_: called.append(True))
    means = [encoder(x, c.expand(5, 3))[0] for c in conditions]
    assert len(called) == 3
    assert encoder.layers[0].in_channels == 1
    assert not torch.allclose(means[0], means[1])
    plain = ConvEncoder((1, 8, 8), 2, channels=(4, 6))
    weights = {name: each[:, :-3] if name == "layers.5.weight" else each for name, each in encoder.state_dict().items()}
    plain.load_state_dict(weights)
    torch.testing.assert_close(encoder(x, torch.zeros(5, 3)), plain(x))


def test_convolutions_refuse_vectors_and_no_channels():
    with pytest.raises(ValueError, match="use MLPEncoder"):
        ConvEncoder((6,), 2)
    with pytest.raises(ValueError, match=r"`channels` must list .* at least one"):
        ConvDecoder(2, (1, 8, 8), channels=())
