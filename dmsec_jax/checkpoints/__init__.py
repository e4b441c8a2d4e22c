"""Floor 2, weights on disk: safe reading, atomic writing, foreign names and layouts to our trees and back, resuming."""
