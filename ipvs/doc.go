// Package ipvs serves Services with the kernel's IPVS.
package ipvs
