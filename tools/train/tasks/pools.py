"""Hand-written word lists, as data. Two words joined by `_` are one entry."""

from __future__ import annotations


def underscored(text: str) -> list[str]:
    return [entry.replace("_", " ") for entry in text.split()]


NOUNS: str = """
apple arrow badge bag ball banana band bank barn basket beach bean bear bed bell bench berry bike bird blanket blossom
boat bone book boot bottle bowl box branch bread brick bridge brush bucket bus butter button cabin cable cactus cake
camera camp candle canoe canyon cap car card carpet carrot castle cat chain chair chalk cheese cherry chess chicken
circle city clay cliff clock cloth cloud clover coast coat coffee coin comet compass copper coral corn cotton crab crane
crayon creek crown crystal cup curtain daisy dance desert desk diamond dinner dish doctor dog doll dolphin door dragon
drawer dream dress drum duck dust eagle ear earth echo egg elbow elephant engine eraser evening eye fabric falcon farm
feather fence fern ferry field fig fire fish flag flame flower flute fog forest fork fox frame frog fruit garden garlic
gate ghost giant ginger glass globe glove goat gold grape grass guitar hammer hat hawk helmet hill honey hood horn horse
hotel house ice inch ink iron island ivory jacket jam jar jelly jewel juice jungle kettle key king kitchen kite kitten
knee knife knot ladder lake lamp lantern leaf leather lemon letter library light lime lion lock log lunch machine magnet
map maple marble market mask meadow melon metal mill mirror moon morning moss mountain mouse mushroom music nail napkin
needle nest net night north notebook nut oak oar ocean olive onion orange orchard otter oven owl paint palace pan paper
parade park parrot path peach pear pearl pencil pepper piano picture pie pillow pilot pine pipe plane planet plate plum
pocket poem pond pony poppy port potato prairie pumpkin puppy puzzle queen quilt rabbit radio rain rainbow raven ribbon
rice ring river road robin robot rock rocket roof room root rope rose ruby rug sail salad salt sand sandal saw scarf
school scissors sea seed shadow sheep shelf shell ship shirt shoe shore silk silver sink skate sky sled slipper smoke
snail snake snow soap sock sofa soil song soup spider spoon spring square squirrel stair stamp star station statue
stone storm stove straw stream street string summer sun sweater swing sword table tail tea temple tent thread throne
thunder ticket tiger timber tiger toast tomato tool torch tower toy train tray treasure tree trumpet tulip tunnel turtle
umbrella valley vase vest village violin voyage wagon walnut wall watch water wave wheel whistle willow wind window wing
winter wire wolf wood wool yard yarn zebra zipper
"""

ADJECTIVES: str = """
able active amber ancient angry bitter blank blind bold brave brief bright broad broken busy calm careful cheap clean
clear clever cold cool cozy crisp curious curly damp dark deep distant dry dull eager early easy elegant empty equal
fair faint fancy fast fierce final fine firm flat fond fragile frank free fresh friendly frosty full funny gentle giant
glad golden grand great green hard hasty heavy hidden hollow honest huge humble hungry icy idle jolly keen kind large
late lazy light little lively lonely long loose loud lovely lucky mellow mild modern narrow neat new nice noble noisy
odd old open pale patient plain polite proud pure quick quiet rapid rare raw ready red rich ripe rough round royal rusty
sad safe salty scarlet secret shallow sharp shiny short shy silent silver simple sleepy slim slow small smart smooth
soft solid sour spicy steady steep stiff strange strong sturdy sudden sunny sweet swift tall tame tender thick thin tidy
tiny tired tough vast velvet vivid warm weak wet wide wild wise wooden young
"""

VERBS: str = """
accept add adjust answer apply arrange ask attach bake bend borrow bring build buy call carry catch change check choose
clean climb close collect color combine compare connect cook copy count cover create cut dance decide deliver describe
design dig draw drink drive drop eat explain fetch fill find fix float fly fold follow gather give grow guess hang help
hide hold hunt invite join jump keep kick knit lead learn leave lend lift listen load look make mark measure meet melt
mend mix move name offer open order pack paint pass pay pick plan plant play point polish pour practice press print pull
push put reach read remember repair repeat reply rest return ride ring roll row run sail save search sell send serve sew
shake share show sing sit skip sleep slide smile sort speak spell spin stand start stir stop study sweep swim take talk
teach tell test think throw tie touch trace trade travel try turn twist use visit wait walk wash watch wave wear win
wipe work wrap write
"""

PAST_VERBS = [
    "carried",
    "watched",
    "painted",
    "found",
    "opened",
    "moved",
    "touched",
    "dropped",
    "followed",
    "borrowed",
    "repaired",
    "measured",
    "lifted",
    "hid",
    "cleaned",
    "wanted",
    "needed",
    "admired",
    "noticed",
    "remembered",
    "forgot",
    "described",
    "ordered",
    "sold",
    "bought",
    "counted",
    "covered",
    "loved",
    "kept",
    "pushed",
    "pulled",
    "traded",
    "washed",
    "lost",
    "drew",
    "crossed",
    "reached",
    "visited",
    "saved",
    "packed",
    "shook",
    "turned",
    "missed",
    "guarded",
    "fixed",
    "gathered",
]

SENTENCE_TAILS = (
    "", "", "", " in the morning", " near the river", " after lunch", " before the storm", " with great care",
    " without a sound", " last summer", " on the old road", " behind the house", " at noon", " for the first time",
    " during the festival", " by the sea", " under the bridge", " once again", " in silence", " every day",
)  # fmt: skip

FIRST_NAMES: str = """
Aaron Abigail Adam Adrian Agnes Ahmed Aisha Alan Albert Alex Alexander Alfred Alice Alicia Alina Amara Amelia Amir Amy
Ana Andrea Andrew Angela Anita Anna Anthony Antonio Arjun Arthur Astrid Audrey Aurora Ava Barbara Beatrice Ben Benjamin
Bianca Boris Brandon Brian Bruno Camila Carl Carla Carlos Carmen Caroline Catherine Cecilia Charles Charlotte Chen Chloe
Chris Clara Claire Claudia Cora Daniel Daniela Daphne David Deborah Denise Diana Diego Dmitri Dominic Dora Dylan Edgar
Edith Edward Elena Eli Elias Elijah Elisa Elizabeth Ella Ellen Emil Emily Emma Eric Erik Esther Ethan Eva Evelyn Farah
Fatima Felix Fernando Fiona Florence Frances Francis Frank Freya Gabriel George Gina Giulia Grace Greta Gustav Hana
Hannah Hans Haruto Hassan Heather Hector Helen Henry Hugo Ian Ibrahim Ida Ines Ingrid Irene Iris Isaac Isabel Isla Ivan
Jack Jacob James Jane Jasmine Jason Javier Jean Jennifer Jessica Joan Joel John Jonas Jordan Jorge Joseph Josephine
Joshua Juan Judith Julia Julian Julie June Kai Karen Karim Karl Kate Katherine Keiko Kenji Kevin Kim Klaus Kofi Kyle
Lara Laura Lauren Lena Leo Leon Leila Liam Lila Lily Linda Lisa Logan Lola Louis Louise Luca Lucas Lucia Lucy Luis Luke
Luna Lydia Mabel Madison Magnus Malik Marco Margaret Maria Marie Marina Mario Mark Marta Martha Martin Mary Mateo
Matilda Matthew Maya Megan Mei Mia Michael Miguel Mila Miles Milo Mina Miriam Mohamed Mona Monica Nadia Naomi Natalie
Nathan Nia Nicholas Nicole Nina Noah Noor Nora Oliver Olivia Omar Oscar Otto Owen Pablo Patricia Patrick Paul Paula
Pedro Penelope Peter Petra Philip Priya Quinn Rachel Rafael Raj Ravi Rebecca Renee Ricardo Richard Rita Robert Roberta
Rosa Rose Ruby Ruth Ryan Sakura Sam Samira Samuel Sandra Sara Sarah Sebastian Selma Sergio Silvia Simon Sofia Sophia
Sophie Stefan Stella Stephen Susan Sven Sylvia Tamara Tara Teresa Theo Thomas Tim Tina Tobias Tom Uma Ursula Valentina
Valerie Vera Victor Victoria Vikram Vincent Violet Walter Wei Wendy William Xavier Yara Yasmin Yuki Yusuf Zara Zoe
"""

LAST_NAMES: str = """
Abbott Adams Ahmed Alvarez Andersen Anderson Bailey Baker Banerjee Barnes Becker Bell Bennett Berg Bianchi Bishop Blake
Bowen Boyd Brennan Brooks Brown Burke Burns Butler Campbell Carlson Carter Castillo Chan Chang Chen Clark Cohen Cole
Collins Cook Cooper Costa Cox Cruz Dalton Davies Davis Delgado Diaz Dixon Dubois Duncan Dunn Edwards Ellis Evans Faber
Ferrari Fischer Fisher Fleming Fletcher Flores Ford Foster Fox Franklin Fraser Garcia Gibson Gomez Gonzalez Gordon
Graham Grant Gray Green Griffin Gupta Haas Hall Hansen Harper Harris Hart Hayes Henderson Hernandez Hill Hoffman Holt
Howard Hughes Hunt Ibrahim Ivanov Jackson Jansen Jenkins Jensen Johnson Jones Kaplan Kaur Keller Kelly Kennedy Khan Kim
King Klein Knight Kovacs Kowalski Kumar Lambert Lane Larsen Lee Lewis Lindgren Liu Lopez Lund Marshall Martin Martinez
Mason Mehta Mendoza Meyer Miller Mitchell Moore Morales Moreno Morgan Morris Murphy Murray Myers Nakamura Nelson Newman
Nguyen Nielsen Novak Obrien Okafor Olsen Ortiz Owens Page Palmer Park Parker Patel Pearson Perez Perry Peters Petrov
Phillips Porter Powell Price Quinn Ramirez Reed Reyes Reynolds Rivera Roberts Robinson Rodriguez Rogers Romano Rossi
Russell Ryan Santos Sato Schmidt Schneider Scott Shah Sharma Shaw Silva Simmons Singh Smith Sokolov Stevens Stewart
Stone Sullivan Suzuki Takahashi Tanaka Taylor Thomas Thompson Torres Turner Vargas Vega Wagner Walker Wallace Wang Ward
Watson Weaver Weber Webb Wells West White Williams Wilson Wood Wright Wu Yamamoto Yang Young Zhang Zimmermann
"""

CITIES: str = """
Accra Amsterdam Ankara Athens Atlanta Auckland Austin Bangkok Barcelona Beijing Belgrade Bergen Berlin Bern Bogota
Boston Brisbane Brussels Bucharest Budapest Buenos_Aires Cairo Calgary Cape_Town Caracas Casablanca Chennai Chicago
Cologne Copenhagen Cork Dakar Dallas Delhi Denver Detroit Dresden Dubai Dublin Edinburgh Florence Frankfurt Geneva Genoa
Ghent Glasgow Granada Hamburg Hanoi Havana Helsinki Hong_Kong Houston Istanbul Jakarta Jerusalem Kyiv Kyoto Lagos Leeds
Lima Lisbon Liverpool London Los_Angeles Luxembourg Lyon Madrid Manchester Manila Marseille Melbourne Memphis Mexico_City
Miami Milan Montreal Moscow Mumbai Munich Nairobi Naples New_York Nice Osaka Oslo Ottawa Oxford Palermo Paris Perth
Phoenix Porto Portland Prague Quito Reykjavik Riga Rio_de_Janeiro Rome Rotterdam San_Diego San_Francisco Santiago
Sao_Paulo Seattle Seoul Seville Shanghai Singapore Sofia Stockholm Stuttgart Sydney Taipei Tallinn Tampa Tehran Tokyo
Toronto Toulouse Trieste Tunis Turin Utrecht Valencia Vancouver Venice Vienna Vilnius Warsaw Wellington Zagreb Zurich
"""

COUNTRIES: str = """
Argentina Australia Austria Belgium Bolivia Brazil Bulgaria Canada Chile China Colombia Croatia Cuba Denmark Ecuador Egypt
Estonia Ethiopia Finland France Germany Ghana Greece Hungary Iceland India Indonesia Ireland Israel Italy Jamaica Japan
Jordan Kenya Latvia Lithuania Malaysia Malta Mexico Morocco Nepal Netherlands New_Zealand Nigeria Norway Pakistan Panama
Peru Philippines Poland Portugal Romania Senegal Serbia Singapore Slovakia Slovenia South_Africa South_Korea Spain Sweden
Switzerland Thailand Tunisia Turkey Uganda Ukraine United_Kingdom United_States Uruguay Vietnam
"""

JOBS: str = """
accountant actor architect artist baker barber biologist bus_driver carpenter chef chemist civil_engineer dancer
data_analyst data_scientist dentist designer doctor economist editor electrician farmer firefighter florist gardener
geologist graphic_designer historian journalist judge lawyer librarian manager mathematician mechanic musician nurse
painter pharmacist photographer physicist pianist pilot plumber police_officer product_manager professor programmer
project_manager psychologist researcher sailor sales_manager scientist secretary singer social_worker software_engineer
soldier surgeon surveyor tailor taxi_driver teacher translator veterinarian waiter writer
"""

PRODUCTS: str = """
backpack bicycle blender bluetooth_speaker camera coffee_maker desk_lamp desk_chair digital_watch drone electric_kettle
fitness_tracker flashlight garden_hose gaming_mouse guitar hair_dryer headphones helmet hiking_boots keyboard laptop
lawn_mower mattress microphone microwave monitor mug notebook office_chair phone_case power_bank printer projector
rain_jacket refrigerator router running_shoes screwdriver_set sleeping_bag smartphone smartwatch stapler suitcase
sunglasses tablet telescope tent toaster toothbrush tripod umbrella vacuum_cleaner wallet washing_machine water_bottle
webcam winter_coat wireless_charger wool_blanket yoga_mat
"""

FOODS: str = """
apple_pie bagel banana_bread burger burrito butter carrots cheese cheesecake chicken_soup chocolate_cake cookies couscous
croissant curry dumplings eggs falafel fish_tacos flour french_fries fried_rice garlic_bread greek_salad green_tea honey
hummus ice_cream lasagna lemonade lentil_soup milk mushrooms noodles oatmeal olive_oil olives omelette onion_soup
orange_juice pancakes pasta pizza pomegranate popcorn porridge potatoes pumpkin_soup quiche ramen rice risotto salmon
salad sandwich sausages spaghetti spinach steak strawberries sugar sushi tofu tomatoes tomato_soup vegetable_stew waffles
yogurt
"""

ANIMALS: str = (
    "cat dog horse parrot rabbit turtle hamster goldfish lizard pony ferret canary snake gecko goat duck hen owl"
)
COLOURS: str = (
    "red blue green yellow orange purple pink black white brown gray silver gold teal violet crimson turquoise"
)

TOPICS: str = """
astronomy baking basketball biology board_games calligraphy camping ceramics chemistry chess cinema classical_music
cooking cycling dancing drawing economics fencing fishing football gardening geography geology golf hiking history jazz
judo karate knitting languages literature mathematics modern_art mythology painting philosophy photography physics poetry
politics pottery programming robotics rowing running sailing sculpture skating skiing surfing swimming tennis theater
volleyball yoga
"""

COMPANY_TAILS = (
    "Systems", "Labs", "Industries", "Technologies", "Group", "Foods", "Motors", "Robotics", "Energy", "Partners",
    "Logistics", "Media", "Software", "Analytics", "Consulting", "Airlines", "Bank", "Studios", "Ltd", "Inc",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CURRENCIES = ("USD", "EUR", "GBP", "JPY", "CHF", "CAD", "AUD", "INR", "CNY", "SEK")
LANGUAGES = (
    "English", "French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Swedish", "Japanese", "Korean",
    "Chinese", "Arabic", "Hindi", "Turkish", "Polish", "Greek",
)  # fmt: skip
