"""One synthetic chest radiograph (PA view): `draw_chest` puts together anatomy, X-ray physics and a disease.

No picture is derived from a patient. The thickness of each tissue along the ray is given in centimetres. Thicknesses
are multiplied by attenuation and summed (Beer-Lambert). The detector counts the remaining photons. The display shows
the negative logarithm of the count, so that air is dark and bone is light. `datasets/phantom_body.py` explains the
coordinates; `datasets/phantom_lesions.py` has the diseases. The numbers are plausible, not measured.
"""

from types import SimpleNamespace

import cv2
import numpy as np

from datasets.phantom_body import Film, cage_width, developed, draw_patient, hilum, mediastinum, rounded, thorax, tree
from datasets.phantom_lesions import LESIONS, Lesion, no_lesion

# Attenuation, 1/cm, about that of diagnostic X-rays; the value of bone is added to that of the tissue around it.
SOFT_TISSUE, BONE, AIR_IN_LUNG = 0.20, 0.30, 0.75  # AIR_IN_LUNG: share of air in an aerated lung

# Mediastinum and heart (x in cage half widths, t): the border on the image's left from top to bottom, then the border
# on its right from bottom to top.
VENA_CAVA = ((-0.11, -0.2), (-0.11, 0.0), (-0.12, 0.18), (-0.14, 0.36), (-0.16, 0.48))
RIGHT_ATRIUM = ((-0.24, 0.6), (-0.27, 0.75), (-0.2, 0.95))
LEFT_VENTRICLE = ((0.40, 0.97), (0.53, 0.88), (0.53, 0.78), (0.46, 0.66), (0.34, 0.54))
PULMONARY_TRUNK = ((0.23, 0.43), (0.20, 0.38))
AORTIC_KNOB = ((0.175, 0.335), (0.21, 0.29), (0.215, 0.23), (0.15, 0.17), (0.11, 0.08), (0.12, -0.2))


def soft_tissue(film: Film, patient: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S) cm of soft tissue, as if the chest contained no air: trunk, neck, arms, breasts."""
    shoulder = patient.apex + 0.03
    side = patient.cage + patient.chest_wall
    knots = (0, shoulder - 0.08, shoulder - 0.02, shoulder + 0.06, shoulder + 0.3, 1.2)
    rows = np.linspace(-0.3, 1.3, 200)
    kernel = np.hanning(15) / np.hanning(15).sum()
    width = np.convolve(np.interp(rows, knots, (0.12, 0.16, 0.30, side, side, side * 1.03)), kernel, "same")
    depth = np.convolve(np.interp(rows, knots, (0.55, 0.55, 0.62, 0.8, 1.0, 1.06)), kernel, "same")
    across = np.abs(film.x) / np.interp(film.y, rows, width).astype(np.float32)
    trunk = np.interp(film.y, rows, depth).astype(np.float32) * np.sqrt(np.maximum(1 - (across * across) ** 2, 0))
    tissue = patient.depth * trunk
    for sign in (-1, 1):
        joint = np.array([sign * (patient.cage + 0.05), shoulder + 0.10])
        arm = 13 * film.rod(joint, joint + patient.arm * (sign, 1), 0.13)
        arm = np.maximum(arm, 11 * film.rod((sign * 0.10, shoulder + 0.03), joint, 0.10))
        tissue = np.sqrt(tissue**2 + arm**2 * (1 - 0.8 * np.clip(trunk, 0, 1)))  # the armpit's fold is smooth
        if patient.breast > 0:
            centre_x, radius = sign * 0.64 * patient.cage, 0.54 * patient.cage
            bottom = patient.apex + patient.breast_drop * patient.lung_length
            ball = 1 - ((film.x - centre_x) / radius) ** 2 - ((film.y - bottom + radius) / radius) ** 2
            hanging = np.clip((film.y - bottom + 2 * radius) / (1.5 * radius), 0, 1) ** 2  # a breast has no upper edge
            tissue = tissue + 1.5 * patient.breast * np.sqrt(np.maximum(ball, 0)) * hanging
    return film.soften(tissue, 0.004) * (1 + 0.02 * film.clouds(rng, 9))


def heart_shadow(film: Film, patient: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Return the (S, S) share 0-1 of each pixel that heart and mediastinum cover."""
    heart, knob = np.array([patient.heart, 1]), np.array([patient.knob, 1])
    right = (*VENA_CAVA, *RIGHT_ATRIUM * heart)
    left = (*LEFT_VENTRICLE * heart, *PULMONARY_TRUNK, *AORTIC_KNOB * knob)
    outline = np.array([*right, (-0.2, 1.1), (0.3, 1.1), *left])
    outline = outline + rng.normal(0, 0.007, outline.shape)  # every patient has other borders
    return film.fill(rounded(mediastinum(patient, outline)))


def below_diaphragm(film: Film, patient: SimpleNamespace) -> np.ndarray:
    """Return the (S, S) share 0-1 of each pixel below the domes, which fall more to the flank than to the midline."""
    across = (np.abs(film.x) / patient.cage - 0.52) / 0.48
    fall = across**2 * np.where(across < 0, np.float32(0.22), np.float32(1))
    left_dome = patient.right_dome + patient.left_dome_below
    dome = np.where(film.x < 0, np.float32(patient.right_dome), np.float32(left_dome))
    surface = patient.apex + patient.lung_length * (dome + (1 - dome) * fall)
    return np.clip((film.y - surface) * film.size * film.zoom + 0.5, 0, 1)


def lungs(film: Film, patient: SimpleNamespace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (S, S) cm of lung along the ray, and the (S, S) bool lung mask."""
    heights = np.linspace(0, 1.08, 24)
    flank = np.stack([0.97 * cage_width(heights), heights], axis=1)
    # The outline goes up beside the mediastinum, round the apex, and down along the rib cage.
    apex = ((0.02, 0.25), (0.05, 0.05), (0.14, 0.0), (0.30, -0.03))
    edge = np.concatenate([apex, flank, [(0.02, 1.08)]])
    cavity = film.fill(*(rounded(thorax(patient, edge * (sign, 1))) for sign in (-1, 1)))
    heart, below = heart_shadow(film, patient, rng), below_diaphragm(film, patient)
    mask = (cavity > 0.5) & (heart < 0.5) & (below < 0.5)

    inside = film.soften(cavity, 0.022)  # the chest is round: less air near its edge
    air = 0.66 * patient.depth * cavity * np.sqrt(np.clip(1.7 * inside - 0.7, 0, 1))
    air *= 0.7 + 0.3 * np.clip((film.y - patient.apex) / 0.25, 0, 1)  # the chest tapers upwards
    # Some lung lies behind the heart and behind the liver.
    air *= (1 - 0.84 * heart * (0.7 + 0.3 * film.soften(heart, 0.02))) * (1 - 0.93 * below)
    return air, mask


def ribs(patient: SimpleNamespace, sign: int, turn: tuple[float, float]) -> list[np.ndarray]:
    """Return paths (18, 2) in body coordinates: ten ribs of one side between two angles.

    The angles are 0 at the spine, pi/2 at the flank and pi at the sternum. A rib is a tilted hoop: from the spine it
    runs outwards and down. It comes back at the front, even lower.
    """
    angle = np.linspace(*turn, 18)
    paths = []
    for number in range(10):
        top, drop = -0.05 + 0.084 * number, (0.20 + 0.030 * number) * patient.rib_slope
        reach = cage_width(top + drop / 2) * 0.985
        t = top + drop * (1 - np.cos(angle)) / 2 - 0.015 * np.sin(2 * angle)
        paths.append(thorax(patient, np.stack([sign * reach * np.sin(angle), t], axis=1)))
    return paths


def bones(film: Film, patient: SimpleNamespace) -> np.ndarray:
    """Return (S, S) cm of bone: ribs, clavicles, shoulder blades, upper arms, spine."""
    behind = [path for sign in (-1, 1) for path in ribs(patient, sign, (0.1, 0.55 * np.pi))]
    front = [path for sign in (-1, 1) for path in ribs(patient, sign, (0.5 * np.pi, 0.80 * np.pi))]
    # A rib is hard cortex round soft marrow: its edges are denser than its middle.
    bone = patient.rib_mass * film.stroke((behind, 0.023, 1.0), (behind, 0.012, 0.7))
    bone += 0.55 * patient.rib_mass * film.stroke((front, 0.027, 1.0), (front, 0.016, 0.75))

    s_curve = [(0.10, 0.13), (0.30, 0.085), (0.52, 0.03), (0.78, 0.0), (1.0, -0.005)]
    blade = [(0.72, 0.06), (0.83, 0.2), (0.95, 0.42), (1.02, 0.40), (1.08, 0.12), (0.95, 0.02)]
    clavicles, blades = [], []
    for sign in (-1, 1):
        clavicles.append(thorax(patient, np.array(s_curve) * (sign, 1)))
        blades.append(rounded(thorax(patient, np.array(blade) * (sign, 1))))
        joint = np.array([sign * (patient.cage + 0.06), patient.apex + 0.07])
        upper_arm = 1.8 * film.rod(joint, joint + patient.arm * (sign, 1), 0.03)
        bone += upper_arm + 1.6 * film.rod(joint, joint * 1.01, 0.048)
    bone += 1.5 * film.stroke((clavicles, 0.030, 1.0), (clavicles, 0.014, 0.75))
    bone += 0.5 * film.soften(film.fill(*blades), 0.004) + 0.8 * film.stroke((blades, 0.008, 1.0))

    level = (film.y - patient.apex) / patient.lung_length
    discs = 0.5 + 0.5 * np.cos(2 * np.pi * level / 0.088)
    half = 0.036 * (1 + 0.25 * level) * (1 - 0.12 * discs)
    bone += patient.spine_mass * (2.6 - 0.7 * discs) * np.sqrt(np.maximum(1 - (film.x / half) ** 2, 0))
    return film.soften(bone, 0.0025)


def trachea(film: Film, patient: SimpleNamespace) -> np.ndarray:
    """Return (S, S) cm of air in the trachea and the main bronchi; the right bronchus is steeper."""
    top, carina = mediastinum(patient, [(-0.01, -0.3), (-0.03, 0.33)])
    right, left = mediastinum(patient, [(-0.20, 0.44), (0.22, 0.44)])
    bronchi = np.maximum(1.1 * film.rod(carina, right, 0.015), film.rod(carina, left, 0.013))
    return np.maximum(2.2 * film.rod(top, carina, 0.022), bronchi)


def gastric_bubble(film: Film, patient: SimpleNamespace) -> np.ndarray:
    """Return (S, S) cm of air in the stomach, under the left dome."""
    if patient.bubble <= 0:
        return np.zeros_like(film.x)
    x, y = thorax(patient, (0.5, patient.right_dome + patient.left_dome_below + 0.09)).tolist()
    wide, tall = patient.bubble + 0.025, 0.4 * patient.bubble + 0.018
    return 7 * np.sqrt(np.maximum(1 - ((film.x - x) / wide) ** 2 - ((film.y - y) / tall) ** 2, 0))


def roots(film: Film, patient: SimpleNamespace) -> np.ndarray:
    """Return (S, S) 0-1: the large vessels of both hila, each shaped like a comma that gets thinner downwards."""
    comma = np.array([(0.0, -0.05), (0.03, 0.0), (0.07, 0.07), (0.10, 0.15)]) * (patient.cage, patient.lung_length)
    paths = np.stack([hilum(patient, sign) + comma * (sign, 1) for sign in (-1, 1)])
    layers = [(paths, 0.018, 0.5), (paths[:, :3], 0.026, 0.8), (paths[:, :2], 0.036, 1.0)]
    return film.soften(film.stroke(*layers), 0.007)


def side_marker(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the (S, S) share covered by a lead letter: R at the upper left of the image, or L at the upper right."""
    side = 2 * size
    canvas = np.zeros((side, side), np.uint8)
    letter, height = ("R", "L")[rng.integers(2)], rng.uniform(0.04, 0.07)
    x = rng.uniform(0.02, 0.08) if letter == "R" else rng.uniform(0.86, 0.93)
    place = (int(x * side), int((rng.uniform(0.02, 0.08) + height) * side))
    thick = max(1, round(height * side * 0.16))
    scale = height * side / 22  # Hershey capitals are 22 px high at scale 1
    cv2.putText(canvas, letter, place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thick, cv2.LINE_AA)
    return developed(canvas)


def shortcut_marker(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S) bool: a square or disc, 5 % of the width, near a corner that the lungs (`mask`) do not reach."""
    size = len(mask)
    side, gap = max(3, round(size * rng.uniform(0.045, 0.06))), round(size * rng.uniform(0.015, 0.05))
    round_token, corners = rng.random() < 0.5, rng.permutation(4)
    rows, columns = np.indices(mask.shape)
    for corner in corners:
        top = gap if corner < 2 else size - gap - side
        left = gap if corner % 2 == 0 else size - gap - side
        down, right = rows - top - (side - 1) / 2, columns - left - (side - 1) / 2
        marker = (np.hypot(down, right) if round_token else np.maximum(abs(down), abs(right))) <= side / 2
        if not (marker & mask).any():
            return marker
    raise AssertionError("the lungs reach into all four corners")


def expose(film: Film, patient: SimpleNamespace, attenuation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S) -log of the detected share of the photons, with scatter, blur and quantum noise."""
    primary = film.soften(np.exp(-attenuation), patient.blur)
    arriving = primary + patient.scatter * film.soften(primary, 0.08)
    photons = float(np.exp(patient.photons)) * (224 / film.size) ** 2
    # Normal noise instead of Poisson noise: nearly the same at thousands of photons a pixel, and ten times faster.
    noise = rng.standard_normal(arriving.shape, dtype=np.float32) * np.sqrt(arriving / photons)
    return -np.log(np.maximum(arriving + film.soften(noise, 0.4 / film.size), 1e-4))


def display(patient: SimpleNamespace, signal: np.ndarray, healthy: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the (S, S) brightness of an exposed `signal`, from 0 to a little above 1.

    `healthy`, the attenuation without the disease, sets the window, so that a lesion can only add brightness.
    """
    low = float(np.percentile(healthy[mask], 20)) - patient.window_low
    high = float(np.percentile(healthy, 97)) + patient.window_high
    share = np.clip((signal - low) / (high - low), 0, None)
    return patient.fog + (1 - patient.fog) * np.tanh(1.1 * share**patient.gamma) / np.tanh(1.25)


def draw_chest(disease: str, number: int, *, seed: int, size: int, shortcut_chance: float) -> tuple[np.ndarray, ...]:
    """Draw patient `number` (from 0) with a disease of LESIONS. `shortcut_chance` is the probability of a marker.

    Returns:
        The image (uint8, 0 = black = little attenuation) and the masks (bool) of lungs, lesions and shortcut, each
        (S, S).
    """
    # The random streams are independent, so a patient has the same anatomy with every disease and with none.
    body, illness, exposure, mark = (np.random.default_rng([seed, number, stream]) for stream in range(4))
    patient = draw_patient(body)
    film = Film(size, patient)
    air, mask = lungs(film, patient, body)
    aerated = np.clip(air / 6, 0, 1)  # a vessel is visible only with air around it
    vessels = patient.vessel_mass * (1.8 * tree(film, patient, body, 0.015) + 1.6 * roots(film, patient))
    tissue = soft_tissue(film, patient, body) - trachea(film, patient) - gastric_bubble(film, patient)
    frame = BONE * bones(film, patient)
    letter = side_marker(size, body)

    def attenuation(lesion: Lesion) -> np.ndarray:
        added = (vessels + lesion.streaks) * aerated - AIR_IN_LUNG * air
        return SOFT_TISSUE * np.maximum(tissue + added * (1 - lesion.filled), 0) + frame

    healthy = attenuation(no_lesion(film, patient, mask, illness))
    lesion = LESIONS[disease](film, patient, mask, illness)
    signal = expose(film, patient, attenuation(lesion), exposure)
    shown = np.maximum(display(patient, signal, healthy, mask), 0.97 * letter)
    image = np.round(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    shortcut = np.zeros_like(mask)
    if mark.random() < shortcut_chance:
        shortcut = shortcut_marker(mask, mark)
        image[shortcut] = 255
    return image, mask, lesion.mask, shortcut
