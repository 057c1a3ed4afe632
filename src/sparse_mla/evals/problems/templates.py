"""The templates: 48 kinds of problem with two to four steps."""

from __future__ import annotations

from .draw import Template

POOLS: dict[str, list[str]] = {
    "girl": [
        "Mia",
        "Anna",
        "Lena",
        "Rosa",
        "Emma",
        "Clara",
        "Nina",
        "Ivy",
        "Zoe",
        "Ruth",
        "Julia",
        "Maya",
        "Sofia",
        "Tara",
        "Olga",
        "Wendy",
        "Paula",
        "Grace",
        "Hana",
        "Lucy",
    ],
    "boy": [
        "Tom",
        "Max",
        "Ben",
        "Leo",
        "Paul",
        "Omar",
        "Sam",
        "Jack",
        "Ivan",
        "Noah",
        "Adam",
        "Eric",
        "Hugo",
        "Karl",
        "Luis",
        "Finn",
        "Dan",
        "Peter",
        "Amir",
        "Yuki",
    ],
    "thing": [
        "stickers",
        "marbles",
        "cards",
        "stamps",
        "coins",
        "shells",
        "beads",
        "buttons",
        "pencils",
        "books",
        "balloons",
        "ribbons",
        "postcards",
        "badges",
        "puzzles",
        "toys",
    ],
    "fruit": ["apples", "pears", "plums", "oranges", "lemons", "peaches", "mangos", "figs"],
    "baked": ["muffins", "cookies", "cakes", "pies", "rolls", "buns", "donuts", "tarts"],
    "plant": ["roses", "tulips", "lilies", "daisies", "ferns", "herbs", "shrubs", "orchids"],
    "animal": ["cows", "sheep", "goats", "ducks", "hens", "horses", "pigs", "rabbits"],
    "wear": ["shirts", "hats", "scarves", "socks", "coats", "gloves", "belts", "dresses"],
    "drink": ["juice", "tea", "milk", "water", "cider", "lemonade"],
    "place": ["school", "library", "museum", "theater", "market", "park", "hotel", "club"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": ["April", "May", "June", "July", "August", "March", "October", "January"],
    "kin": ["sister", "brother", "cousin", "uncle", "aunt", "friend", "neighbor", "teacher"],
    "box": ["box", "bag", "basket", "crate", "jar", "carton", "tray", "drawer"],
    "vehicle": ["bus", "train", "truck", "van", "boat", "car"],
    "color": ["red", "blue", "green", "yellow", "white", "black"],
}

TEMPLATES: tuple[Template, ...] = (
    Template(
        "half_as_many",
        ("X of girl", "t of thing", "m of month", "k of month", "h 5..90", "a = h*2"),
        "{X} sold {a} {t} in {m}. In {k} she sold half as many. How many {t} did she sell in "
        "both months?",
        ("In {k} {X} sold [b:a/2] {t}.", "In both months she sold [c:a+b] {t}."),
    ),
    Template(
        "twice_as_many_left",
        ("X of boy", "Y of girl", "t of thing", "a 5..60", "b 3..40"),
        "{X} has {a} {t}. {Y} has twice as many as {X}, but she gives {b} of hers away. How many "
        "{t} do they have together now?",
        (
            "{Y} had [c:a*2] {t}.",
            "She keeps [d:c-b] of them.",
            "Together they have [e:a+d] {t}.",
        ),
    ),
    Template(
        "shop_change",
        ("X of girl", "t of thing", "n 2..9", "p 2..12", "r 5..60"),
        "{X} buys {n} {t} for ${p} each and a game for ${r}. How much change does she get from "
        "$200?",
        (
            "The {t} cost $[a:n*p].",
            "Everything costs $[b:a+r].",
            "She gets $[c:200-b] back.",
        ),
    ),
    Template(
        "eggs_sold",
        ("X of girl", "a 12..40", "b 2..6", "c 2..5", "p 2..9"),
        "The ducks of {X} lay {a} eggs per day. She eats {b} for breakfast and bakes with {c}. She "
        "sells the rest for ${p} each. How many dollars does she make per day?",
        (
            "She uses [d:b+c] eggs.",
            "She sells [e:a-d] eggs.",
            "She makes $[f:e*p] per day.",
        ),
    ),
    Template(
        "boxes_shared",
        ("X of boy", "t of thing", "b of box", "n 2..9", "q 2..9", "k 2..9", "m = q*k"),
        "{X} packs {t} into a {b}, {m} in each, and fills {n} of them. He shares all {t} equally "
        "among {k} friends. How many {t} does each friend get?",
        ("There are [a:n*m] {t}.", "Each friend gets [c:a/k] {t}."),
    ),
    Template(
        "garden_rows",
        ("X of girl", "f of plant", "r 3..9", "k 4..12", "d 2..20"),
        "{X} plants {r} rows of {f} with {k} in each row. {d} of them dry up. She then plants 15 "
        "new ones. How many {f} are in the garden?",
        (
            "She plants [a:r*k] {f}.",
            "Then [b:a-d] are left.",
            "With the new ones there are [c:b+15] {f}.",
        ),
    ),
    Template(
        "weekly_wage",
        ("X of boy", "w 8..25", "h 3..8", "d 2..6", "s 10..90"),
        "{X} earns ${w} per hour and works {h} hours a day. After {d} days he spends ${s}. How "
        "much money is left?",
        (
            "He earns $[a:w*h] a day.",
            "In {d} days he earns $[b:a*d].",
            "Then $[c:b-s] is left.",
        ),
    ),
    Template(
        "reading_pages",
        ("X of girl", "d of day", "e of day", "a 10..60", "b 5..40", "c 150..400"),
        "{X} reads a book of {c} pages. On {d} she reads {a} pages and on {e} she reads {b} more "
        "than that. How many pages are left to read?",
        (
            "On {e} she reads [f:a+b] pages.",
            "So far she has read [g:a+f] pages.",
            "There are [h:c-g] pages left.",
        ),
    ),
    Template(
        "bus_stops",
        ("v of vehicle", "a 10..60", "b 3..25", "c 3..25", "d 3..25"),
        "A {v} leaves with {a} people. At the first stop {b} get on and {c} get off. At the second "
        "stop {d} get on. How many people are in the {v} now?",
        (
            "After {b} get on there are [e:a+b] people.",
            "After {c} get off there are [f:e-c].",
            "At the second stop there are [g:f+d] people.",
        ),
    ),
    Template(
        "class_groups",
        ("X of boy", "p of place", "a 8..40", "b 8..40", "k 2..9"),
        "{X} visits the {p} with {a} girls and {b} boys. They walk in {k} equal groups. How many "
        "children are in each group?",
        ("There are [c:a+b] children.", "Each group has [d:c/k] children."),
    ),
    Template(
        "bakery_day",
        ("X of girl", "t of baked", "n 3..9", "k 6..12", "s 5..60", "p 2..6"),
        "{X} bakes {n} trays of {t} with {k} on each tray. She keeps {s} and sells the others for "
        "${p} each. How much does she earn?",
        (
            "She bakes [a:n*k] {t}.",
            "She sells [b:a-s] {t}.",
            "She earns $[c:b*p].",
        ),
    ),
    Template(
        "age_sum",
        ("X of boy", "Y of girl", "Z of boy", "a 4..30", "b 2..20", "k 2..3"),
        "{X} is {a} years old. {Y} is {b} years older than {X}. {Z} is {k} times as old as {Y}. "
        "How old are the three together?",
        (
            "{Y} is [c:a+b] years old.",
            "{Z} is [d:c*k] years old.",
            "{X} and {Y} are [e:a+c] together.",
            "All three are [f:e+d] years old.",
        ),
    ),
    Template(
        "age_future",
        ("X of girl", "Y of boy", "a 5..30", "k 2..4", "y 3..20"),
        "{X} is {a} years old and {Y} is {k} times as old. How old will {Y} be in {y} years?",
        ("{Y} is [b:a*k] years old.", "In {y} years he will be [c:b+y]."),
    ),
    Template(
        "milk_bottles",
        ("X of boy", "t of drink", "a 3..12", "d 5..9", "p 2..5"),
        "{X} drinks {a} cups of {t} a day for {d} days. A bottle of {t} costs ${p} and holds one "
        "cup. How many dollars does he spend if a coupon saves him $7?",
        (
            "He drinks [b:a*d] cups.",
            "They cost $[c:b*p].",
            "With the coupon he pays $[e:c-7].",
        ),
    ),
    Template(
        "farm_legs",
        ("X of girl", "u of animal", "v of animal", "a 4..40", "b 2..4", "c 3..30"),
        "{X} has {a} {u} on her farm and {b} times as many {v}. She sells {c} of the {v}. How many "
        "animals does she have now?",
        (
            "She had [d:a*b] {v}.",
            "Then [e:d-c] {v} are left.",
            "She has [f:a+e] animals now.",
        ),
    ),
    Template(
        "savings_goal",
        ("X of boy", "a 20..120", "w 5..12", "n 3..9", "k of kin", "g 10..50"),
        "{X} has ${a}. He saves ${w} a week for {n} weeks, and his {k} gives him ${g}. How much "
        "money does he have?",
        (
            "He saves $[b:w*n].",
            "With his own money that is $[c:a+b].",
            "With the gift he has $[d:c+g].",
        ),
    ),
    Template(
        "bike_still_needs",
        ("X of girl", "p 200..600", "h 20..90", "k of kin", "g 15..60"),
        "{X} wants a bike that costs ${p}. She has ${h}. Her {k} gives her ${g} and her parents "
        "give her twice as much as that. How much more does she need?",
        (
            "Her parents give her $[a:g*2].",
            "The gifts are $[b:g+a].",
            "She has $[c:h+b].",
            "She needs $[d:p-c] more.",
        ),
    ),
    Template(
        "cinema_tickets",
        ("X of boy", "p of place", "a 2..9", "b 6..15", "c 2..8", "d 3..9"),
        "{X} buys tickets for the {p}: {a} for adults at ${b} each and {c} for children at ${d} "
        "each. How much does he pay?",
        (
            "The adults cost $[e:a*b].",
            "The children cost $[f:c*d].",
            "He pays $[g:e+f].",
        ),
    ),
    Template(
        "cut_rope",
        ("X of girl", "k 2..9", "q 3..25", "c 2..40", "l = k*q", "t = l+c"),
        "{X} has a rope of {t} feet. She cuts off {c} feet and then cuts the rest into {k} equal "
        "pieces. How long is each piece?",
        ("The rest is [a:t-c] feet long.", "Each piece is [b:a/k] feet long."),
    ),
    Template(
        "run_laps",
        ("X of boy", "Y of girl", "a 3..12", "d 3..9", "b 2..30"),
        "{X} runs {a} miles a day for {d} days. {Y} runs {b} miles more than {X} in that time. How "
        "many miles do both run?",
        (
            "{X} runs [c:a*d] miles.",
            "{Y} runs [e:c+b] miles.",
            "Both run [f:c+e] miles.",
        ),
    ),
    Template(
        "fruit_baskets",
        ("X of girl", "u of fruit", "v of fruit", "a 4..40", "b 4..40", "k 2..8"),
        "{X} picks {a} {u} and {b} {v}. She puts them in baskets that hold {k} each. How many "
        "baskets does she fill?",
        ("She picks [c:a+b] pieces of fruit.", "She fills [d:c/k] baskets."),
    ),
    Template(
        "three_days_sales",
        (
            "X of boy",
            "t of baked",
            "d of day",
            "e of day",
            "f of day",
            "a 10..80",
            "b 5..40",
            "c 5..30",
        ),
        "{X} sells {a} {t} on {d}, {b} more on {e}, and on {f} he sells {c} fewer than on {e}. "
        "How many {t} does he sell on the three days?",
        (
            "On {e} he sells [g:a+b] {t}.",
            "On {f} he sells [h:g-c] {t}.",
            "On {d} and {e} he sells [i:a+g].",
            "On all days he sells [j:i+h] {t}.",
        ),
    ),
    Template(
        "paint_rooms",
        ("X of girl", "c of color", "r 3..9", "w 2..6", "g 2..5"),
        "{X} paints {r} rooms {c}. Each room has {w} walls and each wall needs {g} cans of paint. "
        "She has 20 cans more than she needs. How many cans does she have?",
        (
            "There are [a:r*w] walls.",
            "They need [b:a*g] cans.",
            "She has [d:b+20] cans.",
        ),
    ),
    Template(
        "parking",
        ("p of place", "a 3..9", "b 10..40", "c 5..50"),
        "The {p} has {a} floors of parking with {b} places on each floor. {c} places are free. How "
        "many places are taken?",
        ("There are [d:a*b] places.", "[e:d-c] places are taken."),
    ),
    Template(
        "lost_and_found",
        ("X of boy", "t of thing", "k of kin", "a 30..99", "b 3..20", "c 10..60"),
        "{X} had {a} {t}. He lost {b} and gave half of the rest to his {k}. Then he bought {c} "
        "more. How many {t} does he have?",
        (
            "After losing some he had [d:a-b] {t}.",
            "After the gift he had [e:d/2].",
            "Now he has [f:e+c] {t}.",
        ),
    ),
    Template(
        "clothes_sale",
        (
            "X of girl",
            "u of wear",
            "v of wear",
            "a 2..6",
            "b 8..40",
            "c 2..6",
            "d 5..25",
            "s 3..20",
        ),
        "{X} buys {a} {u} at ${b} each and {c} {v} at ${d} each. She gets ${s} off. How much does "
        "she pay?",
        (
            "The {u} cost $[e:a*b].",
            "The {v} cost $[f:c*d].",
            "Together they cost $[g:e+f].",
            "She pays $[h:g-s].",
        ),
    ),
    Template(
        "water_tank",
        ("X of boy", "a 50..300", "r 4..12", "h 3..9", "u 10..60"),
        "A tank holds {a} gallons of water. {X} adds {r} gallons a minute for {h} minutes and then "
        "uses {u} gallons. How much water is in the tank?",
        (
            "He adds [b:r*h] gallons.",
            "The tank then holds [c:a+b] gallons.",
            "After use it holds [d:c-u] gallons.",
        ),
    ),
    Template(
        "pizza_slices",
        ("X of girl", "n 3..12", "k 6..9", "f 2..9", "e 2..5"),
        "{X} orders {n} pizzas with {k} slices each. {f} friends eat {e} slices each. How many "
        "slices are left?",
        (
            "There are [a:n*k] slices.",
            "The friends eat [b:f*e] slices.",
            "[c:a-b] slices are left.",
        ),
    ),
    Template(
        "concert_hall",
        ("p of place", "d of day", "a 5..15", "b 8..20", "c 10..60", "m 2..4"),
        "A hall at the {p} has {a} rows with {b} seats. On {d} {c} seats stay empty. Each guest "
        "gets {m} tickets for drinks. How many tickets are given out?",
        (
            "The hall has [e:a*b] seats.",
            "There are [f:e-c] guests.",
            "They get [g:f*m] tickets.",
        ),
    ),
    Template(
        "split_bill",
        ("X of boy", "n 2..6", "a 6..30", "b 5..40", "t 2..15"),
        "{X} and his friends are {n} people. Their food costs ${a} and their drinks cost ${b}. "
        "They give a tip of ${t} and share the bill equally. How much does each pay?",
        (
            "Food and drinks cost $[c:a+b].",
            "With the tip it is $[d:c+t].",
            "Each pays $[e:d/n].",
        ),
    ),
    Template(
        "typing",
        ("X of girl", "w 20..60", "m 3..9", "e 5..40"),
        "{X} types {w} words a minute. She types for {m} minutes, but {e} of the words are wrong. "
        "How many words are right?",
        ("She types [a:w*m] words.", "[b:a-e] words are right."),
    ),
    Template(
        "library_books",
        ("p of place", "m of month", "k of month", "a 100..500", "b 10..90", "c 10..90"),
        "The {p} has {a} books. In {m} it buys {b} books and in {k} it buys {c} books. Then it "
        "gives 50 books away. How many books does it have?",
        (
            "It buys [d:b+c] books.",
            "Then it has [e:a+d] books.",
            "In the end it has [f:e-50] books.",
        ),
    ),
    Template(
        "road_trip",
        ("X of boy", "v of vehicle", "s 30..70", "h 2..6", "t 20..60", "g 2..4"),
        "{X} drives his {v} at {s} miles per hour for {h} hours and then at {t} miles per hour for "
        "{g} hours. How many miles does he drive?",
        (
            "First he drives [a:s*h] miles.",
            "Then he drives [b:t*g] miles.",
            "He drives [c:a+b] miles.",
        ),
    ),
    Template(
        "trip_left",
        ("X of girl", "v of vehicle", "a 200..800", "s 20..60", "h 2..7"),
        "{X} has a trip of {a} miles. Her {v} goes {s} miles per hour. How many miles are left "
        "after {h} hours?",
        ("In {h} hours she goes [b:s*h] miles.", "[c:a-b] miles are left."),
    ),
    Template(
        "pages_per_day",
        ("X of boy", "d 2..9", "q 8..40", "t = d*q", "a 20..90", "c = t+a"),
        "{X} must read {c} pages. He has read {a} pages. How many pages must he read per day to "
        "finish in {d} days?",
        ("He has [e:c-a] pages left.", "He must read [f:e/d] pages per day."),
    ),
    Template(
        "chairs_tables",
        ("p of place", "a 4..20", "b 2..8", "c 2..9", "d 2..8"),
        "The {p} has {a} tables with {b} chairs each and {c} tables with {d} chairs each. 12 "
        "chairs are broken. How many chairs are not broken?",
        (
            "The first tables have [e:a*b] chairs.",
            "The other tables have [f:c*d] chairs.",
            "There are [g:e+f] chairs.",
            "[h:g-12] chairs are not broken.",
        ),
    ),
    Template(
        "colored_beads",
        ("X of girl", "c of color", "d of color", "e of color", "a 10..90", "b 3..60", "k 2..4"),
        "{X} has {a} {c} beads, {b} fewer {d} beads, and {k} times as many {e} beads as {d} beads. "
        "How many beads does she have?",
        (
            "She has [f:a-b] {d} beads.",
            "She has [g:f*k] {e} beads.",
            "The {c} and {d} beads are [h:a+f].",
            "She has [i:h+g] beads.",
        ),
    ),
    Template(
        "piano_minutes",
        ("X of boy", "a 10..50", "b 5..40", "n 2..6"),
        "{X} plays the piano for {a} minutes each morning and {b} minutes each evening. How many "
        "minutes does he play in {n} days if he skips one evening?",
        (
            "He plays [c:a+b] minutes a day.",
            "In {n} days that is [e:c*n] minutes.",
            "Without one evening it is [f:e-b] minutes.",
        ),
    ),
    Template(
        "stock_boxes",
        ("X of girl", "t of wear", "n 3..9", "k 5..30", "s 10..90", "r 5..60"),
        "A store has {n} boxes of {t} with {k} in each. {X} sells {s} {t} and gets {r} back. How "
        "many {t} are in the store?",
        (
            "There were [a:n*k] {t}.",
            "After the sale there are [c:a-s].",
            "With those that came back there are [d:c+r].",
        ),
    ),
    Template(
        "fish_caught",
        ("X of boy", "Y of boy", "Z of girl", "a 3..30", "k 2..5", "b 2..20"),
        "{X} catches {a} fish. {Y} catches {k} times as many as {X}. {Z} catches {b} fewer than "
        "{Y}. How many fish does {Z} catch?",
        ("{Y} catches [c:a*k] fish.", "{Z} catches [d:c-b] fish."),
    ),
    Template(
        "profit",
        ("X of girl", "t of thing", "n 5..40", "c 2..5", "m 2..5", "p = c+m"),
        "{X} buys {n} {t} for ${c} each and sells them for ${p} each. How much profit does she "
        "make?",
        (
            "She pays $[a:n*c].",
            "She gets $[b:n*p].",
            "Her profit is $[d:b-a].",
        ),
    ),
    Template(
        "trees_planted",
        ("X of boy", "p of place", "f of fruit", "a 10..60", "b 10..40", "c 2..9"),
        "{X} wants {a} trees with {f} at the {p}. There are {b} trees now, and he plants {c} trees "
        "a day for 3 days. How many trees are there, counting 5 wild trees?",
        (
            "He plants [d:c*3] trees.",
            "Then there are [e:b+d] trees.",
            "With the wild ones there are [g:e+5] trees.",
        ),
    ),
    Template(
        "phone_minutes",
        ("X of girl", "k of kin", "d of day", "e of day", "a 5..60", "m 2..4", "t 150..400"),
        "{X} calls her {k} for {a} minutes on {d} and {m} times as long on {e}. She pays for {t} "
        "minutes. How many minutes are left?",
        (
            "On {e} she talks [b:a*m] minutes.",
            "She talks [c:a+b] minutes.",
            "[f:t-c] minutes are left.",
        ),
    ),
    Template(
        "team_points",
        ("X of boy", "Y of boy", "Z of boy", "a 4..40", "b 2..20", "h 4..40", "c = h*2"),
        "{X} scores {a} points. {Y} scores {b} points more than {X}. {Z} scores half of {c} "
        "points. How many points do they score?",
        (
            "{Y} scores [d:a+b] points.",
            "{Z} scores [e:c/2] points.",
            "{X} and {Y} score [f:a+d].",
            "They score [g:f+e] points.",
        ),
    ),
    Template(
        "juice_stand",
        ("X of girl", "t of drink", "d of day", "n 10..60", "p 2..5", "c 5..40"),
        "{X} sells {n} cups of {t} on {d} for ${p} a cup. She paid ${c} for the cups and ${c} for "
        "the {t}. How much does she earn?",
        (
            "She gets $[a:n*p].",
            "She paid $[b:c+c].",
            "She earns $[e:a-b].",
        ),
    ),
    Template(
        "allowance",
        ("X of boy", "k of kin", "a 5..15", "w 4..9", "b 5..40", "c 3..20"),
        "{X} gets ${a} a week from his {k}. After {w} weeks he buys a ball for ${b} and a cap for "
        "${c}. How much money does he have left?",
        (
            "He gets $[d:a*w].",
            "He spends $[e:b+c].",
            "He has $[f:d-e] left.",
        ),
    ),
    Template(
        "flower_vases",
        ("X of girl", "u of plant", "v of plant", "a 6..50", "b 6..50", "k 3..9"),
        "{X} has {a} {u} and {b} {v}. She puts {k} flowers in each vase and uses all flowers. Each "
        "vase costs $3. How much do the vases cost?",
        (
            "She has [c:a+b] flowers.",
            "She needs [d:c/k] vases.",
            "They cost $[e:d*3].",
        ),
    ),
    Template(
        "camp_supplies",
        ("X of boy", "t of drink", "n 4..20", "a 2..5", "d 2..6", "h 5..60"),
        "{X} takes {n} children to a camp. Each drinks {a} bottles of {t} a day. The camp lasts "
        "{d} days. He has {h} bottles. How many more does he need?",
        (
            "They drink [b:n*a] bottles a day.",
            "In {d} days they drink [c:b*d].",
            "He needs [e:c-h] more.",
        ),
    ),
)
