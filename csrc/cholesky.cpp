namespace geofast::GEOFAST_ISA {}
