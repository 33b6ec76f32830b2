"""The held-out schemas: no table, column or value word here is ever used in training, except `id`, `name` and `on`.

Each schema is a parent table and a child table that refers to it. A table is its singular noun and its columns as
`name:kind`, with kind one of text, number, real and date; `id` and, in the child, `<parent>_id` come with the table.
"""

from words import word_list

HELD_OUT_SCHEMAS = (
    (
        "observatory",
        "name:text hemisphere:text altitude:number astronomers:number",
        "telescope",
        "maker:text mirror_diameter:real wavelength:text first_light:date",
    ),
    (
        "vineyard",
        "name:text appellation:text hectares:real slope:text",
        "vintage",
        "grape:text alcohol:real barrels:number bottled_on:date",
    ),
    (
        "museum",
        "name:text curator:text galleries:number",
        "sculpture",
        "sculptor:text material:text appraisal:real unveiled:date",
    ),
    (
        "airline",
        "name:text alliance:text fleet:number",
        "flight",
        "gate:text delay_minutes:number passengers:number departed:date",
    ),
    (
        "beekeeper",
        "name:text village:text hives:number",
        "honey_jar",
        "flavour:text grams:number sweetness:real sealed_on:date",
    ),
    (
        "theatre",
        "name:text architect:text seats:number",
        "premiere",
        "playwright:text acts:number ovation_seconds:number staged_on:date",
    ),
    (
        "reef",
        "name:text ocean:text depth:real coral_cover:number",
        "dive",
        "diver:text visibility:text oxygen_used:real dived_on:date",
    ),
    (
        "orchestra",
        "name:text conductor:text musicians:number",
        "concert",
        "venue:text composer:text encores:number performed_on:date",
    ),
    (
        "bakery",
        "name:text baker:text ovens:number",
        "pastry",
        "filling:text topping:text calories:number sugar_share:real",
    ),
    (
        "satellite",
        "name:text orbit:text mass_kg:real thrusters:number",
        "downlink",
        "antenna:text megabytes:number signal_noise:real received_on:date",
    ),
    ("castle", "name:text duke:text towers:number", "knight", "weapon:text horse:text duels:number knighted:date"),
    (
        "glacier",
        "name:text continent:text thickness:real",
        "expedition",
        "leader:text tents:number climbers:number departed_on:date",
    ),
)

HELD_OUT_VALUES = word_list("""
Vega Andromeda Tuscany Merlot Riesling Marble Granite Lufthansa Hamlet Pacific Baltic Sibelius Mahler Almond
Pistachio Lancelot Excalibur Patagonia Alps Lisbon Helsinki Nairobi Olga Dmitri Yuki Fatima Hans acacia clover murky
polar equatorial cinnamon oak limestone Gothic Verdi Chopin
""")


def held_out_words() -> frozenset[str]:
    """Every word of a held-out identifier, except `id`, `name` and the `on` of dates, which all schemas share."""
    words: set[str] = set()
    for parent, parent_columns, child, child_columns in HELD_OUT_SCHEMAS:
        for name in [parent, child] + [c.split(":")[0] for c in (parent_columns + " " + child_columns).split()]:
            words.update(name.split("_"))
    return frozenset(words - {"id", "name", "on"})
