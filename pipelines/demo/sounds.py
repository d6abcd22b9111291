"""Labelled tasks on recordings that are not speech: what each one is, read from its name.

See :mod:`ssast.pipelines.demo.tasks` for names, labels and groups. The sounds of a game that differ
in a number only (``splash1.ogg``, ``splash2.ogg``) are takes of one sound, and one group.
"""

import re

from ssast.pipelines.demo.tasks import DEMO_TASKS, Label, Task

# Voices, music and what says nothing of its sound
NO_EVENT = re.compile(
    r"hydrogen-drumkits|fillets-ng|klettres|ktuberling|/music/|music loops|/music\d|voices/|_desc|"
    r"announcer|/symbols/|vocals|taunt|reload|bodyimpact",
    re.I,
)
# (class, what a name of it holds); the first that fits counts
EVENTS = tuple(
    (name, re.compile(pattern, re.I))
    for name, pattern in (
        ("keyboard", r"bucklespring"),
        (
            "monster",
            r"freedoom.*/ds(?!pl|noway|oof|ske?swg)\w+(sit\d?|act|dth\d?|pain)$|freedoom.*/dssklatk|"
            r"/aliens/.*/(die|hurt|attack)|growl\d|freedoom.*/ds(vilatk|manatk|skeatk|bospn|claw)",
        ),
        (
            "footstep",
            r"footstep(?!.*(splash|crouch|stand|water_|hitground))|ds(hoof|metal)$",
        ),
        (
            "water",
            r"splash(?!_?(hard|soft|10))|water(?!col|bul|melon)|watr_|bubble|droplet|/drops|gurp|"
            r"plunge|ripples|oceanwave|parklandlake|toilet",
        ),
        (
            "explosion",
            r"explo(?!rer|sions/)|explosions/(exp|empsmall|meteor|quake|shockwave|tank|small|medium|"
            r"large|xlarge)\.|xplod|rocket-exp|dsbarexp|dsfirxpl|cineboom|rocklx|plasmx|"
            r"wstbexpl|fireworks",
        ),
        (
            "laser",
            r"laser(?!death|sight|-impact)|plasma(?!-blade|-impact|ball-impact)|hyprbf|railgf|/ptl-|"
            r"dsplasma|dsbfg|bfg_fire|lasfly",
        ),
        (
            "gunshot",
            r"bullet-(?!impact)|combat-gun|machgf|sshotf|vulcanf|machinegun|tripleshot|shotgun\.|"
            r"cannon-fire|nailgun.*fire|dspistol|dsshotgn|dsdshtgn|dssgtatk|tracer|grenlf|"
            r"grenade-launcher|shoot/(large|medium|small|xlarge|launch)",
        ),
        (
            "impact",
            r"break(?!beat)|crunch|casings|ric\d|bounce|/clank|metalhit|dstink|shatter|heavyimpact|"
            r"hgrenb|-impact\.|wnalimp|wstbimp",
        ),
        (
            "scream",
            r"(female|male|fem)(death|hurt|scream)|player/.*/(death|pain|fall|drown|gasp)|scream|"
            r"ds(pldeth|pdiehi|plpain|oof)$|babycry|player_damage",
        ),
        (
            "bird",
            r"/bird(?!yl)|birds/|rooster|/(gull|crow|misc_crow|owl|duck|goose|hawk|hen|albatross|"
            r"booby|crane|emu|flamingo|heron|pelican|pheasant|quail|quetzal|sparrow|stork|vulture|"
            r"wood_grouse|iora|eagle-owl|guinea_fowl|zozulka)\d*\.",
        ),
        (
            "mammal",
            r"mammals/|marsupials/|/(bark|cow|moo|dog|sheep|wolf|snarl|bats|cat|kitten|meow|horse|"
            r"sealion|rabbitchitter|blackcat|bat_left)\w*\.|"
            r"noises/(bear|calf|chimpanzee|chinchilla|deer|dolphin|elephant|ferret|foal|giant_panda|"
            r"giraffe|hamster|hedgehog|hyena|jaguar|jerboa|koala|lion|little_monkey|lynx|moose|mouse|"
            r"otter|pig|porcupine|raccoon|rhinoceros|squirrel|tiger|wallaby|whale|yak|zebra)\.",
        ),
        (
            "fire",
            r"/fire(soft|\d+|start|end)?\.|smallfire|fire_(fire|large|small|extinguish)|flamer|lava|"
            r"furnace|napalm|firewasteland|gunpowder_burning",
        ),
        (
            "door",
            r"door|dsbd(opn|cls)|dsdor(opn|cls)|dsdb(opn|cls)|chest_|fencegate|window(open|close)|"
            r"creak|/dr1_|dsswtch|perc_door",
        ),
        (
            "vehicle",
            r"(car|motorcycle)passing|carhorn|/(train|tractor|airplane|excavator|helicopter|"
            r"quadrocopter|jet|cessna|firetruck|policecar|tankmove)\d*\.|railtrain|trafic|parklandplane|"
            r"(f16|f18|apache|t38)_?\d?\.|diesel|hover-|flyby|rockettakeoff",
        ),
        (
            "machine",
            r"machin|engine|generator|industry|powercoal|substation|dron(e|ing)|/fan\d?\.|pump|"
            r"ventilat|blacksmith|/mill\d|mine\d|recycle|windmill|factory|vacuum|washing|sewing|"
            r"3d_printer|neonhum|/hum\d?\.|nuclearloop|raze|construction|dspst(art|op)|dssaw",
        ),
        (
            "instrument",
            r"noises/(accordion|aeoline|bagpipes|cello|changu|clarinet|cuica|dulzaina|erhu|"
            r"electric_guitar|flute|gamba|grand_piano|guitar|hand_organ|hang|harmonica|harp|horn|kazoo|"
            r"lute|natural_horn|ney|oboe|organ|piano|pipe|quena|rabel|recorder|rozhok|saxophone|"
            r"squeezebox|topshuur|trumpet|ukulele|violin|washint|western_concert_flute|whistle|xun|"
            r"xylophone|yangqin|yueqin|youhikko|zhaleyka|zither|zurna)\.|instruments/|"
            r"guit_|ambi_piano",
        ),
        (
            "beep",
            r"beep|blip|bleep|/menu\d|popup|pkup|elec_(ping|plip|pop|blup|twip|chime)|"
            r"console(fail|success)|ui/assets|dsitemup|dswpnup|dsgetpow|lockon|newmission|/mail\.",
        ),
    )
)

DRUMS = tuple(
    (name, re.compile(pattern, re.I))
    for name, pattern in (
        ("kick", r"kick|bass_?drum|^bd\d?_|^bd\d|_bd_"),
        ("snare", r"snare|^s[nd]\d?_|_sn_|^rs_|^sr_|(?<!t)rim|side ?stick"),
        (
            "hihat",
            r"hi-?hat|hhat|hat[ _]|hat(open|closed|pedal|semiopen|swish|choke)|cymbal_[cop]|"
            r"(^|_)[co]?h[ho]\d?_|^hh(open|closed|pedal)|(open|pedal)hat",
        ),
        ("tom", r"tom[\d_ -]|tom(high|low|mid|floor)|^tm\d?_|^ft_|^t\d_"),
        ("ride", r"(?<!crash)ride|^r[dc]\d?_"),
        ("crash", r"crash|splash|china|^cra_|^cc_"),
        ("cowbell", r"cowbell|agogo|^cb\d?_|_cb$|^bl_|(?<!_)bell( hit| mute)?$"),
        ("hand_drum", r"conga|bongo|djembe|cajon|sangban|kenkeni|dunun|^tabla_"),
    )
)
# Between them they have all pieces, and as many clips of them as a test needs
EVALUATED_KITS = frozenset({"BJA_Pacific", "Gimme A Hand 1.0", "Millo_MultiLayered2"})


def first_match(name: str, rules: tuple[tuple[str, re.Pattern[str]], ...]) -> str | None:
    """Return the class of the first rule that matches a name."""
    return next((found for found, pattern in rules if pattern.search(name)), None)


def event_label(name: str) -> Label | None:
    """Return the kind of sound, grouped by what its takes have in common."""
    found = None if NO_EVENT.search(name) else first_match(name, EVENTS)
    return Label(found, without_number(name)) if found else None


def without_number(name: str) -> str:
    """Strip suffix and number: ``grass1.ogg`` and ``grass.2.ogg`` become ``grass``.

    Of a name that is nothing but numbers (a key, and whether it went down: ``30-0.wav``) the first
    one stays.
    """
    stem = re.sub(r"\.(wav|ogg|mp3|flac)$", "", name.lower())
    stem = re.sub(r"[-_. ]\d+$", "", stem)
    return re.sub(r"(?<=[a-z])[-_. ]*\d+[a-z]?$", "", stem)


def drum_label(name: str) -> Label | None:
    """Return the piece of a drum kit, grouped by kit."""
    match = re.search(r"^hydrogen-drumkits/.*/([^/]+)/([^/]+)\.\w+$", name) or re.search(
        r"^(sonic-pi)-samples/.*/samples/((?:bd|sn|drum|elec|perc|tabla)_[^/]+)\.flac$", name
    )
    found = match and first_match(match[2], DRUMS)
    return Label(found, match[1]) if match and found else None


SOUND_TASKS = (
    Task("events", "kind of an unseen sound", event_label, 25, 120, first_part=True, even=True),
    Task("drums", "piece of an unseen drum kit", drum_label, 25, 150, held=EVALUATED_KITS),
)
STUDY_TASKS = (*DEMO_TASKS, *SOUND_TASKS)
