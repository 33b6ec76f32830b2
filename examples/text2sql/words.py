"""Word lists from which training schemas and values are made.

Every list is deliberately ordinary business and daily-life vocabulary. No word here occurs in a held-out schema
(`heldout.py`); `schemas.random_word` also rejects an invented word that happens to be one of those.
"""


def word_list(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


TABLE_NOUNS = word_list("""
employee department customer order product invoice supplier student teacher course school book author publisher
loan member hospital doctor patient nurse ward city country region river mountain hotel room guest booking car truck
driver garage dealer team player coach match league stadium movie actor director song album artist band playlist
recipe ingredient chef restaurant meal shop store cashier receipt warehouse shipment parcel courier route station
train bus ticket trip farm animal crop field tractor factory machine worker shift part assembly bank account
payment transfer branch card policy claim agent client lawyer case court judge project task ticket sprint developer
company office building floor apartment tenant landlord lease property house street park tree plant garden flower
device sensor reading phone computer laptop printer server network router website page visit user post comment
message group event speaker session sponsor donor charity grant election candidate voter party vote newspaper
article editor photo camera video channel subscriber game level score tournament club race runner bicycle rider
boat harbor captain port container cargo pet vet clinic vaccine medicine pharmacy prescription lab sample test
exam grade lecture professor university library shelf toy child parent family neighbor festival stall vendor
market stock trader fund bond contract bid auction buyer seller rental lesson tutor gym trainer workout salon
appointment stylist mechanic repair tool bridge road tunnel survey answer dataset experiment scientist paper bottle
""")

MODIFIERS = word_list("""
new old main local annual monthly weekly daily online retail sales staff home school base net gross unit early late
public private senior junior central regional global active past current internal external primary summer winter
spare mobile digital paper steel wooden green blue red north south east west special regular test service support
""")

NUMBER_WORDS = word_list("""
salary age price amount quantity weight height width length score rating budget cost revenue profit discount tax
balance points goals wins losses capacity distance speed duration year hours pages copies population area stock
level rank votes views likes downloads units bonus fee rent wage interest deposit temperature pressure
volume power energy usage mileage stars credits attendance visits clicks errors sales margin income expenses
density frequency size floors rooms bedrooms employees_count experience marks percentage priority stops
turnover debt premium shares dividend lifetime latency battery memory storage range humidity rainfall yield
""")

NUMBER_PREFIXES = word_list(
    "total base unit net gross annual monthly daily initial final max min list target shipping hourly"
)

TEXT_WORDS = word_list("""
title city country department category status color brand model genre language type role position job email phone
address region district team owner manager supplier_name nationality gender nickname surname destination origin
method format label currency payment_type major subject degree specialty breed species diagnosis treatment sector
industry platform version browser theme topic mood style shape fabric cuisine difficulty season stage result
warranty condition location street neighborhood state province branch office shift grade_level section zone
provider carrier vehicle_type fuel engine transmission_type tier segment reason feedback comment note code
""")

PLACE_WORDS = frozenset(
    word_list("city country department region district team province branch office sector state zone")
)

DATE_WORDS = word_list("""
created_at updated_at order_date birth_date hire_date start_date end_date due_date release_date signup_date
published_on delivered_on shipped_on paid_on opened_on closed_on joined_on expires_on last_login visit_date
event_date start_day founded_on purchase_date return_date renewal_date booked_on modified_on
""")

VALUES = word_list("""
Sales Marketing Engineering Finance Support Paris London Berlin Madrid Rome Oslo Tokyo Lima Cairo Boston Chicago
Dallas Austin Denver Toronto Sydney France Germany Spain Italy Norway Japan Brazil Canada Mexico India China Alice
Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Laura Maria Nina Oscar Peter Rosa Sam Tina Victor Smith
Jones Brown Garcia Miller Davis Wilson Taylor red green blue black white yellow active pending closed cancelled
shipped new used gold silver bronze basic premium standard Action Comedy Drama Jazz Rock Pop small medium large
cash credit manager clerk analyst intern Toyota Ford Honda Apple Samsung Sony cotton wool leather English French
""")

ONSETS = word_list("""
b c d f g h k l m n p r s t v w b c d f g h j k l m n p r s t v z
br ch cl cr dr fl fr gl gr pl pr sc sh sk sl sp st str th tr tw
""")
VOWELS = word_list("a e i o u a e i o u ai ea ee io oa ou")
CODAS = word_list("b ck d f g l ll m n nd ng nt p r rd rm rt s sh sk ss st t th x") + ("",) * 16

# Words to cut up for invented names; those with an underscore would make an odd word.
SPLICED = tuple(word for word in TABLE_NOUNS + MODIFIERS + NUMBER_WORDS + TEXT_WORDS if "_" not in word)

# Names that SQL keeps for itself. A table may be called `orders`, never `order`.
RESERVED = frozenset(
    word_list("""
all and any as asc avg between by case cast check count cross desc distinct drop else end except exists for from full
glob group having in index inner into is join left like limit match max min natural not null of on or order outer
plan primary references right select set sum table temp then to trigger union unique update using values view when
where with
""")
)
