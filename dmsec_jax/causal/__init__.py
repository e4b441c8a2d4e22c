"""Floor 2, graphs with hidden causes and what can be learnt about them; the only folder that imports numpyro.

graphs       marks and edges, ancestors, acyclic, ancestral, bow-free and arid graphs, what hiding variables does
separation   m-separation of all pairs at once
projection   acyclic directed mixed graph -> maximal ancestral graph
pag          maximal ancestral graph -> partial ancestral graph, Markov equivalence
"""
