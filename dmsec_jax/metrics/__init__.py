"""Floor 1, measures on arrays: they take pictures, features and scores, never a model.

image          distance between pictures: PSNR, SSIM, MS-SSIM
distribution   distance between sets of features: Frechet, kernel, precision and recall
cliques        maximum cliques of a thresholded graph, exact within a node budget
clusters       similarity matrices, threshold sweeps, ranking, calibration
extraction     how much of a training set an extracted set gives back, with intervals
evidence       ROC, AUC, p-values of pictures and of sets, thresholds that were not chosen on what they judge
protection     what a protection did to a picture, and to the loss
graph          graphs against the truth: marks, edge probabilities, fit
"""
