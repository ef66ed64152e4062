"""What stands beside the tables of the budget on ResNets: what decides it, and what was tried."""

PREDICTED = """Time of chosen networks at batch 1, as shares of dense in fp32: as the menu predicted it before they were
made, in the form that it was timed in, and as that form was measured."""
WHY = """## What decides it, and what was tried

Measured beside earlier rows of ResNet-20 on a Xeon; like the machine of the rows of both networks above, but for those
of AVX2 alone, it multiplies integers of 8 bits in one instruction (VNNI).

- **Without that instruction.** On a processor with AVX2 alone the same files of ResNet-20 in 8 bits gain 1.6x where
  they gain 2.26x with VNNI (1.34x while other programs ran on both cores), so that the peers fall back. Under the floor
  of 1 0.68 points are lost on the 5,000 that it is held on, 1.28 on those not seen, 0.98 on all 10,000; a difference of
  two networks on 5,000 pictures is known to 0.35 points at best. Under the floor of 2 1.72 points are lost on all;
  Torch-Pruning's 0.3 in 8 bits loses 1.90 on the unseen pictures and counts there, 2.05 on all and would not: against
  what is left then karui is 1.50 and 1.54 times as fast.
- **What these searches have that the others had not.** Factors are balanced before they go into 8 bits, which cost 0.3
  points in such a network, and costs up to 0.14 now; the choice is made by harms and by their roots, and what each does
  as a whole decides; a bisection ends at a point that needs the epochs; floors are held on 5,000 pictures. Without the
  second, the point at 0.45 of the time had 88.6 instead of 89.9 % right after one pass, and the search for 2 points
  ended at 2.09x with 2.3 lost; without the third, one search for 1 point spent its passes beside the floor and ended
  with the dense network.
- **Other programs.** While three programs ran on two cores, one file of ResNet-56 in 8 bits took 0.59 of dense instead
  of 0.43, in turns and by processor time: what is light suffers more from caches that others fill. Searches misled so
  are not shown. In a first race of all rows under such a load the floors of 1 and 2 were 1.29 and 1.34 times ahead at
  batch 1, 1.29 and 1.28 at batch 64.
- **Time.** In 8 bits narrow layers save nothing there: the networks of Torch-Pruning at 0.3 and 0.5, in the very form
  that karui deploys, took 1.03 and 0.97 of the dense network's time at batch 1, and 0.95 and 0.94 at batch 64. What is
  left out saves all of its time: without two blocks of the first stage 0.67 and 0.65, without three 0.52 and 0.47,
  without two and one of the last stage 0.60 and 0.58 (medians of 20 and 8 rounds in turns).
- **The learning rate.** Without the first two blocks, after one pass over 5,000 pictures, 87.1, 88.0, 82.4 and 47.9 %
  of 2,000 test pictures were right at rates of 0.002, 0.005, 0.02 and 0.05. The range test that `karui compress` does
  by itself gives 0.0036. Former runs of this benchmark trained everything at 0.02, in batches of 128.
- **Which blocks.** With normalisations seen anew, leaving out the first, second or third block moves the output by
  0.24, 0.39 and 0.71 nats, without by 0.76, 0.62 and 2.05: judged as they stood, the second would go before the
  first. All three are too many: after the same pass 80.5 % were right, and 86.2 without two and one of the second
  stage.
- **Full-range weights.** Weights of 8 bits instead of 7 take the same time, and 91.68 instead of 91.73 % are right,
  with ResNet-56 93.44 instead of 93.46: so 7 stay, which also hold on machines that sum in 16 bits.
- **The search.** Searches under earlier rules ended at 2.92x and 2.88x with 284 kB, 1.24 points lost on the 8,000, for
  both floors (Xeon). For these rows the time that the engine's recorder takes itself at every operator was taken off
  the layers' times: with it, parts that are left out were said to save a fifth more than they do. The machine was busy
  with other work all the while. That cost the search for 1 point a training: its third and fourth point are one
  network, measured at 0.47 of the dense time and at 0.36, and was trained twice. It ended with 0.2 points gained on the
  2,000 pictures, so there was room that its passes did not reach. Since then such a network is timed anew and trained
  on.
- **ResNet-56.** Searches that asked for nothing but time left out blocks of the first two stages, which take the time,
  while most bytes are in the third: their files were 8 % and half a per cent larger than the best peer's, at 3.91x and
  5.07x (batch 1). Since then choices that harm alike are told apart by bytes. Alike means within 2 % of the least harm:
  at 0.75 of the time in 8 bits that takes 0.75 of the bytes instead of 0.85 and moves the output as much (0.148 instead
  of 0.145 nats), where within 10 % it took 0.66 and moved it by 0.23.
- **How often it was searched.** A search at a tolerance of 10 % was stopped half way; its first point took 0.30 of the
  time. The first two at 2 % ended at 3.28x and 3.61x with 760 kB (1.12 lost), and at 3.66x and 3.96x with 662 kB (1.31
  lost): what more passes bring was foreseen by ResNet-20 alone, so that the search for 1 point gave up by a hair the
  point that both begin with, and the other went on with it and saw it lose 0.8. The rows are those of the searches
  after that, which foresee by both networks; they had the points that were alike from those before.
- **ResNet-56 on AVX2 alone.** The machine was busy with other work, its own and others'. The search for 1 point saw
  its first point, at half of the time, lose 2.0 points after one pass, was thought to lose 0.91 after five where 0.9
  was allowed, and spent three passes on others before it went on with one at 0.49. That for 2 went from there to 0.26
  and 0.37, which lost 5.0 and 3.3, and had three passes left for the first point: 0.9 lost, so that half of the floor
  was not used. They are 1.2 and 1.3 times as fast as the best of Torch-Pruning; the file for 1 point is a tenth
  larger, that for 2 a sixth smaller. With VNNI the bar was reached.
- **Predictions on ResNet-56.** Both searches ran at once, on two cores, which slows 8 bits more than 32: the first
  point was foreseen at 0.253 and measured at 0.314 then, and at 0.29 when it had been trained.

Not run: more passes than these."""
