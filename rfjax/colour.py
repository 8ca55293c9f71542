"""Colours as the judges of videos compare them: hues in degrees, and CIELAB."""

import numpy as np

# sRGB (linear) → CIE XYZ over the white point D65 (IEC 61966-2-1), so that white is (1, 1, 1)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ /= _XYZ.sum(1, keepdims=True)


def hues(rgb):
    """Hue of every pixel [..., 3], degrees: the angle of the colour around the grey axis."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.rad2deg(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def hue_gap(hue, other):
    """Distance between hues, degrees."""
    return np.abs((hue - other + 180) % 360 - 180)


def lab(rgb):
    """sRGB in [0, 1], [..., 3] → CIELAB: L from 0 to 100, a, b (D65)."""
    rgb = np.asarray(rgb, np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((np.maximum(rgb, 0) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def delta_e(rgb, other):
    """CIE76 colour difference of sRGB colours [..., 3]: the distance in CIELAB; 2.3 is just seen."""
    return np.linalg.norm(lab(rgb) - lab(other), axis=-1)
