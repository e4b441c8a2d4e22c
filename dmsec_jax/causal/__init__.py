"""Floor 2, graphs with hidden causes and what can be learnt about them; the only folder that imports numpyro.

graphs       marks and edges, ancestors, acyclic, ancestral, bow-free and arid graphs, what hiding variables does
separation   m-separation of all pairs at once
projection   acyclic directed mixed graph -> maximal ancestral graph
pag          maximal ancestral graph -> partial ancestral graph, Markov equivalence
families     random skeletons: Erdos-Renyi, scale-free, blocks, small world
sem          the model of graphs, mechanisms and sample covariances, and its uses
rows         rows of data from it, of any noise and mechanism
features     conditional independence of all pairs, of order 0, 1, 2 and full, as features
skeleton     the posterior over skeletons, trained on simulated data
mag          the score from the covariance, residual iterative conditional fitting, BIC
penalties    acyclic, ancestral, bow-free, arid: smooth penalties, and the edges that offend
climb        local search by likelihood and number of edges, one pair at a time
refine       local searches from a likely skeleton
guide        the skeleton posterior as the last transformation of an optimiser
"""
