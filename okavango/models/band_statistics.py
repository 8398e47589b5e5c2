"""Statistics of published data sets, by band name, each with its source. Units are the sensor's stored numbers unless said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from okavango.models.preprocess import Normalise, PreprocessError
from okavango.models.sensors import find_band

STUDY = "Corley et al. 2023 (arXiv 2305.13456), isaaccorley/resize-is-all-you-need 2b7aed8"


@dataclass(frozen=True)
class BandStatistics:
    """Mean and standard deviation of each band over a data set, or its lowest and highest values, or both.

    Attributes:
        channels: in the order of the numbers; look them up by name, never by position.
        units: of the numbers, see `Bands`; sensor, level: of the data set.
        origin: data set and split; source: who published the numbers.
    """

    channels: tuple[str, ...]
    sensor: str
    level: str
    units: str
    origin: str
    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self):
        for name in ("mean", "std", "low", "high"):
            numbers = getattr(self, name)
            if numbers and len(numbers) != len(self.channels):
                raise PreprocessError(f"{self.origin}: {name} has {len(numbers)} numbers for {len(self.channels)} bands")

    def of(self, name: str, channels: Sequence[str]) -> tuple[float, ...]:
        """`name` ("mean", "std", "low" or "high") of these bands, in this order, under any name that the sensor knows.

        Raises:
            PreprocessError: a band or statistic that the table does not have.

        Example:
            >>> STATISTICS["so2sat_random"].of("mean", ("B8A", "red"))
            (0.1956554664, 0.1023065236)
        """
        numbers = getattr(self, name)
        if not numbers:
            raise PreprocessError(f"{self.origin}: no {name} is known")
        known = {self._key(channel): number for channel, number in zip(self.channels, numbers, strict=True)}
        missing = [channel for channel in channels if self._key(channel) not in known]
        if missing:
            raise PreprocessError(f"{self.origin}: no statistics of band {missing[0]!r}; there are {', '.join(self.channels)}")
        return tuple(known[self._key(channel)] for channel in channels)

    def _key(self, channel: str) -> str:
        band = find_band(self.sensor, channel)
        return band.name if band else channel.lower()

    def standard(self, channels: Sequence[str], factor: float = 1.0) -> Normalise:
        """Standardise these bands, of which values are `factor` times those of the table (1e-4 for numbers / 10,000)."""
        mean, std = (tuple(number * factor for number in self.of(name, channels)) for name in ("mean", "std"))
        return Normalise(rule="standard", mean=mean, std=std, origin=self.origin)

    def eight_bit(self, channels: Sequence[str], factor: float = 1.0) -> Normalise:
        """Stretch mean -+ 2 std to 0..1 in 256 levels, as 8-bit copies of a data set are made (SSL4EO-S12, SatMAE)."""
        pairs = [
            (mean * factor, std * factor) for mean, std in zip(self.of("mean", channels), self.of("std", channels), strict=True)
        ]
        low, high = (tuple(mean + sign * 2 * std for mean, std in pairs) for sign in (-1, 1))
        return Normalise(rule="stretch", low=low, high=high, quantise=256, origin=self.origin)


_S2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
_S2_L2A = tuple(name for name in _S2 if name != "B10")
_EUROSAT = (*_S2[:8], "B09", "B10", "B11", "B12", "B8A")  # as its files lie
_SO2SAT = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
_CLAY_S2 = _SO2SAT
_RGB = ("red", "green", "blue")
_RGBN = (*_RGB, "nir")
_CLAY = "Clay foundation model, configs/metadata.yaml"
_DOFA = "DOFA (arXiv 2403.15356), its published normalisation"
_SSL4EO = "SSL4EO-S12 (arXiv 2211.07044)"

STATISTICS: dict[str, BandStatistics] = {
    # -- Sentinel-2, numbers (reflectance x 10,000) without the offset of baseline 04.00
    "eurosat": BandStatistics(
        _EUROSAT,
        mean=(
            *(1354.40546513, 1118.24399958, 1042.92983953, 947.62620298, 1199.47283961, 1999.79090914, 2369.22292565),
            *(2296.82608323, 732.08340178, 12.11327804, 1819.01027855, 1118.92391149, 2594.14080798),
        ),
        std=(
            *(245.71762908, 333.00778264, 395.09249139, 593.75055589, 566.4170017, 861.18399006, 1086.63139075),
            *(1117.98170791, 404.91978886, 4.77584468, 1002.58768311, 761.30323499, 1231.58581042),
        ),
        sensor="sentinel-2",
        level="L1C",
        units="dn",
        origin="EuroSAT train",
        source=STUDY,
        low=(816, 0, 0, 0, 174, 153, 128, 0, 40, 1, 5, 1, 91),
        high=(17720, 28000, 28000, 28000, 23381, 27791, 28001, 28002, 15384, 183, 24704, 22210, 28000),
    ),
    "eurosat_spatial": BandStatistics(
        _EUROSAT,
        mean=(1375.99, 1142.63, 1077.55, 1003.84, 1280.73, 2130.35, 2524.05, 2454.19, 785.50, 12.46, 1969.92, 1206.24, 2779.41),
        std=(249.85, 337.95, 392.57, 612.42, 562.29, 806.83, 1022.64, 1065.43, 410.58, 4.89, 958.48, 740.72, 1157.29),
        sensor="sentinel-2",
        level="L1C",
        units="dn",
        origin="EuroSAT spatial split, train",
        source="torchgeo 0.8.1",
    ),
    "bigearthnet": BandStatistics(
        _S2_L2A,
        mean=(
            *(340.76769064, 429.9430203, 614.21682446, 590.23569706, 950.68368468, 1792.46290469, 2075.46795189, 2218.94553375),
            *(2266.46036911, 2246.0605464, 1594.42694882, 1009.32729131),
        ),
        std=(
            *(554.81258967, 572.41639287, 582.87945694, 675.88746967, 729.89827633, 1096.01480586, 1273.45393088, 1365.45589904),
            *(1356.13789355, 1302.3292881, 1079.19066363, 818.86747235),
        ),
        sensor="sentinel-2",
        level="L2A",
        units="dn",
        origin="BigEarthNet train",
        source=f"SeCo (arXiv 2103.16607); {STUDY}",
    ),
    "treesatai": BandStatistics(
        _S2_L2A,
        mean=(
            *(253.16619873, 237.94383240, 384.66244507, 253.62670898, 625.80566406, 2074.90234375, 2651.58642578, 2762.07763672),
            *(2923.10107422, 2926.36914063, 1307.51831055, 600.52941895),
        ),
        std=(
            *(127.59476471, 137.15211487, 160.50038147, 178.53047180, 233.07756042, 542.36413574, 721.97839355, 798.61383057),
            *(790.64379883, 717.23822021, 462.27331543, 300.08972168),
        ),
        sensor="sentinel-2",
        level="L2A",
        units="dn",
        origin="TreeSatAI 200 m train",
        source=STUDY,
    ),
    "ssl4eo_s12_l1c": BandStatistics(
        _S2,
        mean=(1612.9, 1397.6, 1322.3, 1373.1, 1561.0, 2108.4, 2390.7, 2318.7, 2581.0, 837.7, 22.0, 2195.2, 1537.4),
        std=(791.0, 854.3, 878.7, 1144.9, 1127.5, 1164.2, 1276.0, 1249.5, 1345.9, 577.5, 47.5, 1340.0, 1142.9),
        sensor="sentinel-2",
        level="L1C",
        units="dn",
        origin="SSL4EO-S12 L1C",
        source=f"{_SSL4EO}; torchgeo 0.8.1",
    ),
    "ssl4eo_s12_l1c_50k": BandStatistics(
        _S2,
        mean=(*(1605.58, 1390.78, 1314.87, 1363.52, 1549.44, 2091.75, 2371.72, 2299.90, 2560.30, 830.07, 22.10, 2177.07, 1524.07),),
        std=(786.79, 850.35, 875.06, 1138.85, 1122.18, 1161.59, 1274.39, 1248.43, 1345.53, 577.32, 51.15, 1336.10, 1136.54),
        sensor="sentinel-2",
        level="L1C",
        units="dn",
        origin="SSL4EO-S12 L1C, 50,000 places",
        source=f"{_SSL4EO}, its pretraining code",
    ),
    "ssl4eo_s12_l2a_50k": BandStatistics(
        _S2_L2A,
        mean=(752.40, 884.30, 1144.16, 1297.47, 1624.91, 2194.64, 2422.21, 2517.76, 2581.65, 2645.52, 2368.51, 1805.07),
        std=(1108.03, 1155.15, 1183.63, 1368.11, 1370.27, 1355.55, 1416.51, 1474.79, 1439.31, 1582.28, 1455.52, 1343.48),
        sensor="sentinel-2",
        level="L2A",
        units="dn",
        origin="SSL4EO-S12 L2A, 50,000 places",
        source=f"{_SSL4EO}, its pretraining code",
    ),
    "fmow_sentinel": BandStatistics(
        _S2,
        mean=(*(1370.19, 1184.38, 1120.77, 1136.26, 1263.74, 1645.40, 1846.87, 1762.60, 1972.62, 582.73, 14.77, 1732.16, 1247.92),),
        std=(633.15, 650.28, 712.13, 965.23, 948.98, 1108.07, 1258.36, 1233.15, 1364.39, 472.38, 14.31, 1310.37, 1087.60),
        sensor="sentinel-2",
        level="L1C",
        units="dn",
        origin="fMoW-Sentinel train",
        source="SatMAE (arXiv 2207.08051)",
    ),
    "clay_sentinel_2": BandStatistics(
        _CLAY_S2,
        mean=(1105, 1355, 1552, 1887, 2422, 2630, 2743, 2785, 2388, 1835),
        std=(1809, 1757, 1888, 1870, 1732, 1697, 1742, 1648, 1470, 1379),
        sensor="sentinel-2",
        level="L2A",
        units="dn",
        origin="Clay Sentinel-2 L2A",
        source=_CLAY,
    ),
    # -- Sentinel-2, reflectance
    "so2sat_random": BandStatistics(
        _SO2SAT,
        mean=(
            *(0.1242865659, 0.1100167736, 0.1023065236, 0.1153219552, 0.1598948602),
            *(0.1820440648, 0.1751356259, 0.1956554664, 0.1564872265, 0.1112253634),
        ),
        std=(
            *(0.0392269499, 0.0470916721, 0.0653264087, 0.0624056654, 0.0758367486),
            *(0.0891717321, 0.0905092190, 0.0996856136, 0.0990187856, 0.0873385911),
        ),
        sensor="sentinel-2",
        level="L1C",
        units="reflectance",
        origin="So2Sat random split, train",
        source=STUDY,
    ),
    "so2sat_culture_10": BandStatistics(
        _SO2SAT,
        mean=(
            *(0.1237569612, 0.1092774636, 0.1010855203, 0.1142398616, 0.1592656692),
            *(0.1814723601, 0.1745740312, 0.1950160735, 0.1542846887, 0.1090505070),
        ),
        std=(
            *(0.0395879599, 0.0477782628, 0.0663661671, 0.0635887491, 0.0774438715),
            *(0.0910163509, 0.0921846656, 0.1016458123, 0.0999177304, 0.0878063251),
        ),
        sensor="sentinel-2",
        level="L1C",
        units="reflectance",
        origin="So2Sat culture-10 split, train",
        source=STUDY,
    ),
    # -- pictures, 0..255
    "imagenet": BandStatistics(
        _RGB,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        sensor="",
        level="",
        units="u8",
        origin="imagenet-1k train",
        source="torchvision; 255 times (.485, .456, .406) and (.229, .224, .225)",
    ),
    "ucmerced": BandStatistics(
        _RGB,
        mean=(122.60405554, 124.08536424, 114.21736564),
        std=(55.80735538, 51.78990456, 50.0009605),
        sensor="rgb",
        level="",
        units="u8",
        origin="UC Merced train",
        source=STUDY,
    ),
    "resisc45": BandStatistics(
        _RGB,
        mean=(93.89391792, 97.11226906, 87.56775284),
        std=(51.84919672, 47.2365918, 47.06308786),
        sensor="rgb",
        level="",
        units="u8",
        origin="RESISC45 train",
        source=STUDY,
    ),
    "sat6": BandStatistics(
        _RGBN,
        mean=tuple(255 * number for number in (0.4405, 0.4497, 0.4478, 0.4201)),
        std=tuple(255 * number for number in (0.2147, 0.1878, 0.1456, 0.3007)),
        sensor="naip",
        level="",
        units="u8",
        origin="SAT-6 train",
        source=STUDY,
    ),
    "sat_493m": BandStatistics(
        _RGB,
        mean=tuple(255 * number for number in (0.430, 0.411, 0.296)),
        std=tuple(255 * number for number in (0.213, 0.156, 0.143)),
        sensor="rgb",
        level="",
        units="u8",
        origin="SAT-493M",
        source="DINOv3 (arXiv 2508.10104)",
    ),
    "fmow_rgb": BandStatistics(
        _RGB,
        mean=tuple(255 * number for number in (0.4182, 0.4215, 0.3991)),
        std=tuple(255 * number for number in (0.2877, 0.2754, 0.2764)),
        sensor="rgb",
        level="",
        units="u8",
        origin="fMoW RGB train",
        source="SatMAE (arXiv 2207.08051)",
    ),
    "clay_naip": BandStatistics(
        _RGBN,
        mean=(110.16, 115.41, 98.15, 139.04),
        std=(47.23, 39.82, 35.43, 49.86),
        sensor="naip",
        level="",
        units="u8",
        origin="Clay NAIP",
        source=_CLAY,
    ),
    "clay_linz": BandStatistics(
        _RGB,
        mean=(89.96, 99.46, 89.51),
        std=(41.83, 36.96, 31.45),
        sensor="rgb",
        level="",
        units="u8",
        origin="Clay LINZ",
        source=_CLAY,
    ),
    "dofa_gaofen": BandStatistics(
        _RGBN,
        mean=(123.95, 92.58, 97.28, 90.32),
        std=(67.34, 62.83, 60.59, 60.39),
        sensor="",
        level="",
        units="u8",
        origin="DOFA Gaofen",
        source=_DOFA,
    ),
    "dofa_sentinel_2": BandStatistics(
        ("B04", "B03", "B02", "B05", "B06", "B07", "B08", "B11", "B12"),
        mean=(114.11, 114.82, 126.64, 84.34, 97.85, 103.94, 101.44, 72.33, 56.67),
        std=(77.84, 69.97, 67.42, 64.57, 61.73, 61.34, 60.30, 47.89, 42.56),
        sensor="sentinel-2",
        level="",
        units="u8",
        origin="DOFA Sentinel-2, 8-bit pictures of Satlas",
        source=_DOFA,
    ),
    # -- radar
    "ssl4eo_s12_s1": BandStatistics(
        ("VV", "VH"),
        mean=(-12.59, -20.26),
        std=(5.26, 5.91),
        sensor="sentinel-1",
        level="GRD",
        units="db",
        origin="SSL4EO-S12 Sentinel-1 GRD",
        source=_SSL4EO,
    ),
    "clay_sentinel_1": BandStatistics(
        ("VV", "VH"),
        mean=(-12.113, -18.673),
        std=(8.314, 8.017),
        sensor="sentinel-1",
        level="RTC",
        units="db",
        origin="Clay Sentinel-1 RTC",
        source=_CLAY,
    ),
    "dofa_sentinel_1": BandStatistics(
        ("VH", "VV"),
        mean=(166.36, 88.46),
        std=(64.83, 43.07),
        sensor="sentinel-1",
        level="",
        units="u8",
        origin="DOFA Sentinel-1, 8-bit pictures of Satlas",
        source=_DOFA,
    ),
    "bigearthnet_s1_range": BandStatistics(
        ("VV", "VH"),
        low=(-48, -42),
        high=(6, 16),
        sensor="sentinel-1",
        level="GRD",
        units="db",
        origin="BigEarthNet train, percentiles 2 and 98",
        source="torchgeo",
    ),
    "bigearthnet_s2_range": BandStatistics(
        _S2_L2A,
        low=(1,) * 12,
        high=(9859, 12872, 13163, 14445, 12477, 12563, 12289, 15596, 12183, 9458, 5897, 5544),
        sensor="sentinel-2",
        level="L2A",
        units="dn",
        origin="BigEarthNet train, percentiles 2 and 98",
        source="torchgeo",
    ),
    # -- Landsat and HLS, numbers
    "prithvi_1": BandStatistics(
        ("B02", "B03", "B04", "B8A", "B11", "B12"),
        mean=(775, 1081, 1229, 2497, 2204, 1611),
        std=(1282, 1270, 1399, 1368, 1292, 1155),
        sensor="hls-s30",
        level="L2",
        units="dn",
        origin="Prithvi-EO-1 HLS",
        source="Prithvi-EO-1.0-100M (arXiv 2310.18660)",
    ),
    "prithvi_2": BandStatistics(
        ("B02", "B03", "B04", "B8A", "B11", "B12"),
        mean=(1087, 1342, 1433, 2734, 1958, 1363),
        std=(2248, 2179, 2178, 1850, 1242, 1049),
        sensor="hls-s30",
        level="L2",
        units="dn",
        origin="Prithvi-EO-2 HLS",
        source="Prithvi-EO-2.0 (arXiv 2412.02732)",
    ),
    "clay_landsat_l1": BandStatistics(
        ("B4", "B3", "B2", "B5", "B6", "B7"),
        mean=(10678, 10563, 11083, 14792, 12276, 10114),
        std=(6025, 5411, 5468, 6746, 5897, 4850),
        sensor="landsat-8",
        level="L1",
        units="dn",
        origin="Clay Landsat Collection 2 level 1",
        source=_CLAY,
    ),
    "clay_landsat_l2": BandStatistics(
        ("B4", "B3", "B2", "B5", "B6", "B7"),
        mean=(13705, 13310, 12474, 17801, 14615, 12701),
        std=(9578, 9408, 10144, 8277, 5300, 4522),
        sensor="landsat-8",
        level="L2",
        units="dn",
        origin="Clay Landsat Collection 2 level 2",
        source=_CLAY,
    ),
    "clay_modis": BandStatistics(
        ("b1", "b2", "b3", "b4", "b5", "b6", "b7"),
        mean=(1072, 1624, 931, 1023, 1599, 1404, 1051),
        std=(1643, 1878, 1449, 1538, 1763, 1618, 1396),
        sensor="modis",
        level="",
        units="dn",
        origin="Clay MODIS",
        source=_CLAY,
    ),
}


def statistics(name: str) -> BandStatistics:
    """A table by name.

    Raises:
        PreprocessError: unknown name.
    """
    if name not in STATISTICS:
        raise PreprocessError(f"unknown statistics {name!r}; expected {', '.join(STATISTICS)}")
    return STATISTICS[name]
